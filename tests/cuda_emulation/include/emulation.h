// What the emulated headers ask of the runtime: the running thread, its block, barriers, warp collectives, asynchronous
// copies and launches. See ../README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Set before a thread runs; threads never move from one thread of the operating system to another.
extern thread_local uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern thread_local uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern thread_local dim3 blockDim __attribute__((tls_model("initial-exec")));
extern thread_local dim3 gridDim __attribute__((tls_model("initial-exec")));

namespace emulation {

// The thread that runs, within its warp; set like the variables below.
extern thread_local int lane __attribute__((tls_model("initial-exec")));

// __syncthreads: every thread of the block that has not returned.
void barrier();

// The lanes of a warp meet at `instruction`; the last to come runs `run` with what each of them brought. Lanes that meet at
// different instructions, or with one that has returned, are reported.
void collective(const char* instruction, void* brought, void (*run)(void* const (&lanes)[32]));

// The dynamic shared memory of the block, poisoned with NaN before the block starts.
unsigned char* shared_memory();

// Reports an access to [pointer, pointer + bytes) outside shared memory, or not aligned to `alignment`.
void check_shared(const char* instruction, const void* pointer, std::size_t bytes, std::size_t alignment);

// cp.async: the destination is NaN from now until a wait for this copy's group.
void copy_async(void* shared, const void* global, int bytes, int size);
void commit_copies();
void wait_copies(int pending);

// Ends the launch; cudaGetErrorString gives the message.
[[noreturn]] void fail(const char* message);

// Runs every block, on several threads of the operating system; false where one failed.
bool launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& body);

// Host side: as cudaFuncSetAttribute says; what a failed launch or a wrong argument said.
bool allow_shared(const void* kernel, int bytes);
const char* message();

}  // namespace emulation
