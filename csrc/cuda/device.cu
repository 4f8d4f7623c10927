// Tells the two libraries apart that the same objects of C++ are linked into (csrc/build_cuda.py).
#include "cuda/device.h"

namespace crossvit::cuda {

bool runs_on_gpu() {
#ifdef __CUDACC__
  return true;
#else
  return false;
#endif
}

}  // namespace crossvit::cuda
