// Shadows CUDA's header of this name. With CUDA_EMULATION kernels and launchers are plain C++ that runs on
// the CPU; without it host code is compiled as for a GPU, and calls the emulation's runtime. See
// tests/emulation/README.md.
#pragma once

#include <crt/host_defines.h>
// CUDA's own, for the types and signatures.
#include <cuda_runtime_api.h>

#if defined(CUDA_EMULATION)
#include <vector_functions.h>

#include "cuda_emulation/math.h"
#include "cuda_emulation/memory.h"
#include "cuda_emulation/runtime.h"
#include "cuda_emulation/scheduler.h"
#include "cuda_emulation/warp.h"
#endif
