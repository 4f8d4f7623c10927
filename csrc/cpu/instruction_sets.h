// Which of the compiled instruction sets runs. No torch header.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace crossvit {

struct InstructionSet {
  const Kernels* kernels;
  bool supported;  // by this CPU and its operating system
};

// Those that were compiled in, from the least to the most.
const std::vector<InstructionSet>& instruction_sets();

// The kernels of the set in force: at first those of the most that this CPU has, or of the one that the environment variable
// CROSSVIT_KERNELS_ISA names.
const Kernels& active();

// Its name. Throws std::invalid_argument where the environment variable names one that cannot run here.
std::string instruction_set();

// Has another one run. Throws std::invalid_argument where it was not compiled in, or this CPU lacks it.
void set_instruction_set(const std::string& name);

}  // namespace crossvit
