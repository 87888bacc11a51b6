// A libcuda.so.1 without a GPU: what Triton's own C code calls to load a cubin and to launch it. Nothing
// runs.
//
// It looks at what it is given as a driver does, writes down what arrives and refuses what a driver would
// refuse. Two devices of compute capability 9.0. How many parameters a kernel has, and of which sizes, is
// read from the cubin, as is the block that the kernel was compiled for.

#define _GNU_SOURCE
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { OPTIN = 227 * 1024, WITHOUT_ASKING = 48 * 1024, MAX_PARAMETERS = 64, MAX_RANGES = 1 << 16 };

// ---- what the tests read and write ----

static char* journal;
static size_t journal_length;

static void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char* line;
  const int length = vasprintf(&line, format, arguments);
  va_end(arguments);
  journal = realloc(journal, journal_length + length + 1);
  memcpy(journal + journal_length, line, length + 1);
  journal_length += length;
  free(line);
}

static struct {
  CUdeviceptr first, end;
} ranges[MAX_RANGES];
static int range_count;

/// A line for each module loaded and each launch, since the last call.
const char* stub_journal(void) {
  static char* read;
  free(read);
  read = journal != NULL ? journal : strdup("");
  journal = NULL;
  journal_length = 0;
  return read;
}

/// From now on `size` bytes at `pointer` are device memory. Returns 0 if there are too many.
int stub_allocate(CUdeviceptr pointer, size_t size) {
  if (range_count == MAX_RANGES) return 0;
  ranges[range_count].first = pointer;
  ranges[range_count++].end = pointer + size;
  return 1;
}

// ---- modules and functions ----

struct CUfunc_st {
  char* name;
  int parameters;
  unsigned sizes[MAX_PARAMETERS];
  unsigned block[3];   // .reqntid
  int dynamic_shared;  // the most that a launch may ask for
};

struct CUmod_st {
  const unsigned char* image;  // the caller's, who asks for the function before it goes
};

static const Elf64_Shdr* section(const unsigned char* image, const char* prefix, const char* name) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = (const char*)image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; ++i) {
    const char* found = names + sections[i].sh_name;
    if (strncmp(found, prefix, strlen(prefix)) == 0 && strcmp(found + strlen(prefix), name) == 0)
      return &sections[i];
  }
  return NULL;
}

// A kernel's .nv.info is a list of attributes: format, kind and, in format 4, the size of what follows.
static int read_info(struct CUfunc_st* function, const unsigned char* image) {
  enum { SIZED = 4, REQUIRED_BLOCK = 0x10, PARAMETER = 0x17, PARAMETERS_SIZE = 0x19 };
  const Elf64_Shdr* info = section(image, ".nv.info.", function->name);
  if (info == NULL || section(image, ".text.", function->name) == NULL) return 0;
  unsigned total = 0, sum = 0;
  const unsigned char* end = image + info->sh_offset + info->sh_size;
  for (const unsigned char* at = image + info->sh_offset; at + 4 <= end;) {
    uint16_t size;
    memcpy(&size, at + 2, 2);
    if (at[0] == SIZED && at[1] == REQUIRED_BLOCK) memcpy(function->block, at + 4, 12);
    if (at[0] == SIZED && at[1] == PARAMETER) {
      uint16_t ordinal;
      uint32_t packed;
      memcpy(&ordinal, at + 8, 2);
      memcpy(&packed, at + 12, 4);
      if (ordinal >= MAX_PARAMETERS) return 0;
      function->sizes[ordinal] = packed >> 18;
      sum += packed >> 18;
      if (ordinal >= function->parameters) function->parameters = ordinal + 1;
    }
    if (at[1] == PARAMETERS_SIZE) total = size;
    at += 4 + (at[0] == SIZED ? size : 0);
  }
  for (int i = 0; i < function->parameters; ++i) {
    if (function->sizes[i] == 0) return 0;
  }
  return function->block[0] != 0 && sum <= total && total <= sum + 4 * function->parameters;
}

static __thread CUcontext context;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (context == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  const Elf64_Ehdr* header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = malloc(sizeof **module);
  (*module)->image = image;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  note("unload\n");
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = calloc(1, sizeof **function);
  (*function)->name = strdup(name);
  (*function)->dynamic_shared = WITHOUT_ASKING;
  if (!read_info(*function, module->image)) return CUDA_ERROR_NOT_FOUND;
  note("load %s\n", name);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = function->block[0];
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = 32;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  if (value < 0 || value > OPTIN) return CUDA_ERROR_INVALID_VALUE;
  function->dynamic_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (context == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < range_count; ++i) {
    if (ranges[i].first <= pointer && pointer < ranges[i].end) {
      *(CUdeviceptr*)data = pointer;
      return CUDA_SUCCESS;
    }
  }
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  if (context == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  if (config->gridDimX == 0 || config->gridDimY == 0 || config->gridDimZ == 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimX > INT32_MAX || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  if (memcmp(block, function->block, sizeof block) != 0) return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > (unsigned)function->dynamic_shared) return CUDA_ERROR_INVALID_VALUE;
  if (extra != NULL || config->numAttrs != 0) return CUDA_ERROR_INVALID_VALUE;  // no kernel here needs any
  note("launch %s %llu %u,%u,%u %u,%u,%u %u %llu ", function->name, (unsigned long long)function,
       config->gridDimX, config->gridDimY, config->gridDimZ, block[0], block[1], block[2],
       config->sharedMemBytes, (unsigned long long)config->hStream);
  for (int i = 0; i < function->parameters; ++i) {
    for (unsigned byte = 0; byte < function->sizes[i]; ++byte)
      note("%02x", ((unsigned char*)parameters[i])[byte]);
    note(i + 1 < function->parameters ? "," : "\n");
  }
  return CUDA_SUCCESS;
}

// ---- devices and contexts ----

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 2;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return 0 <= ordinal && ordinal < 2 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = OPTIN;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = OPTIN + 1024;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      *value = 1;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 5120;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* primary, CUdevice device) {
  static char contexts[2];
  *primary = (CUcontext)&contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext current) {
  context = current;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "not the argument";
  return CUDA_SUCCESS;
}

// ---- linked to, not called ----

CUresult cuCtxGetDevice(CUdevice* device) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
