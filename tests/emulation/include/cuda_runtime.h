// Shadows CUDA's header of this name: with it, kernels and launchers are plain C++ that runs on the CPU.
// See tests/emulation/README.md.
#pragma once

#if !defined(CUDA_EMULATION)
#error \
    "this is the emulation of CUDA on the CPU: compile with -DCUDA_EMULATION, or take this folder off the path"
#endif

#include <crt/host_defines.h>
// CUDA's own, for the types and signatures.
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "cuda_emulation/launch.h"
#include "cuda_emulation/math.h"
#include "cuda_emulation/memory.h"
#include "cuda_emulation/scheduler.h"
#include "cuda_emulation/warp.h"
