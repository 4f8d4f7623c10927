#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN 1
#else
#define EMULATION_ASAN 0
#endif

namespace emulation {

#ifdef EMULATION_UCONTEXT

void prepare(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

static void swap(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// The registers that a call keeps lie on the stack that is left; rdi says where to note its pointer, rsi is the other one's.
extern "C" void emulation_switch_stacks(void** left, void* entered);
asm(R"(
.text
.p2align 4
.type emulation_switch_stacks, @function
emulation_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stacks, .-emulation_switch_stacks
)");

void prepare(Fiber& fiber, void (*entry)()) {
  // As after a call: the stack pointer is 8 beyond a multiple of 16, where entry's own return address would lie.
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack) + fiber.size;
  auto* slot = reinterpret_cast<void**>(top & ~std::uintptr_t{15});
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber.stack_pointer = slot;
}

static void swap(Fiber& from, Fiber& to) { emulation_switch_stacks(&from.stack_pointer, to.stack_pointer); }

#endif

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
  swap(from, to);
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void started([[maybe_unused]] Fiber& launcher) {
#if EMULATION_ASAN
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (launcher.stack == nullptr) {  // the first switch came from the launching thread: now its stack is known
    launcher.stack = const_cast<void*>(bottom);
    launcher.size = size;
  }
#endif
}

}  // namespace emulation
