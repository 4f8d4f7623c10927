#include "log.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emulation {
namespace {

std::mutex guard;
Logged mode = Logged::no;
std::string lines;       // a JSON object a launch, comma between them
std::string unfinished;  // the last one, but for what its copies moved
std::string answer;

void finish(std::uint64_t copied) {
  if (unfinished.empty()) return;
  lines += (lines.empty() ? "" : ",") + unfinished + ", \"copied\": " + std::to_string(copied) + "}";
  unfinished.clear();
}

// The function of a program or library that begins `offset` bytes into it, by the symbol table of its file, which also has
// those of unnamed namespaces.
std::string symbol_at(const char* file, std::uint64_t offset) {
  std::ifstream stream(file, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(stream), {}};
  Elf64_Ehdr header{};
  if (bytes.size() < sizeof header) return "kernel";
  std::memcpy(&header, bytes.data(), sizeof header);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), bytes.data() + header.e_shoff, header.e_shnum * sizeof(Elf64_Shdr));
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const char* names = bytes.data() + sections[section.sh_link].sh_offset;
    for (std::uint64_t at = 0; at < section.sh_size; at += sizeof(Elf64_Sym)) {
      Elf64_Sym symbol;
      std::memcpy(&symbol, bytes.data() + section.sh_offset + at, sizeof symbol);
      if (symbol.st_value == offset && ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) return names + symbol.st_name;
    }
  }
  return "kernel";
}

}  // namespace

std::string kernel_name(const void* kernel) {
  static std::mutex guard;
  static std::unordered_map<const void*, std::string> known;
  const std::lock_guard lock(guard);
  std::string& name = known[kernel];
  if (!name.empty()) return name;
  Dl_info found{};
  if (dladdr(kernel, &found) == 0) return "kernel";
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(found.dli_fbase);
  const std::string symbol = found.dli_saddr == kernel ? found.dli_sname : symbol_at(found.dli_fname, offset);
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  name = status == 0 ? demangled : symbol;
  std::free(demangled);
  // Without the list of parameters, which template arguments like (Type)1 come before.
  int open = 0;
  for (std::size_t i = name.size(); i-- > 0;) {
    open += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
    if (name[i] == '(' && open == 0) {
      name.resize(i);
      break;
    }
  }
  if (name.starts_with("void ")) name = name.substr(5);
  return name;
}

Logged log_launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared) {
  const std::lock_guard lock(guard);
  if (mode == Logged::no) return mode;
  finish(0);
  char sizes[160];
  std::snprintf(sizes, sizeof sizes, "\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %zu", grid.x, grid.y,
                grid.z, block.x * block.y * block.z, shared);
  unfinished = "{\"kernel\": \"" + kernel_name(kernel) + sizes;
  return mode;
}

void log_copied(std::uint64_t bytes) {
  const std::lock_guard lock(guard);
  finish(bytes);
}

}  // namespace emulation

// For ctypes. 0: no record, 1: of what runs, 2: instead of running; forgets what was recorded.
extern "C" __attribute__((visibility("default"))) void crossvit_emulation_record(int how) {
  using namespace emulation;
  const std::lock_guard lock(guard);
  mode = static_cast<Logged>(how);
  lines.clear();
  unfinished.clear();
}

// A JSON list of the launches since then: kernel, grid, threads, shared (bytes), copied (bytes by asynchronous copies).
extern "C" __attribute__((visibility("default"))) const char* crossvit_emulation_launches() {
  using namespace emulation;
  const std::lock_guard lock(guard);
  finish(0);
  answer = "[" + lines + "]";
  return answer.c_str();
}
