// Stacks that are switched by hand: a few instructions on x86-64, ucontext elsewhere (or with EMULATION_UCONTEXT).
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace emulation {

struct Fiber {
#ifdef EMULATION_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  void* stack;  // its lowest address; of the thread that launches, unknown until it is left
  std::size_t size;
  void* fake_stack;  // AddressSanitizer's
};

// The next switch to `fiber` calls entry(), which must not return.
void prepare(Fiber& fiber, void (*entry)());

// Leaves `from`, which runs, for `to`; returns when something switches back. What leaves for good says so.
void switch_to(Fiber& from, Fiber& to, bool for_good = false);

// The first thing that runs on a fiber's stack after prepare().
void started(Fiber& launcher);

}  // namespace emulation
