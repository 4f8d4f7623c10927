#include "log.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

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

}  // namespace

std::string kernel_name(const void* kernel) {
  Dl_info found{};
  if (dladdr(kernel, &found) == 0 || found.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : found.dli_sname;
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
