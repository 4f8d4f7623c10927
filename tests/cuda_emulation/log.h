// A record of launches, for whoever wants to know what a call would launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulation.h"

namespace emulation {

enum class Logged { no, beside, instead };  // instead: the launch is noted and not run

Logged log_launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared);
void log_copied(std::uint64_t bytes);  // of the launch noted last

// The kernel's name and template arguments.
std::string kernel_name(const void* kernel);

}  // namespace emulation
