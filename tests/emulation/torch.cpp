// torch's side of a GPU, for bindings that are compiled as for a real one: tensors on a device, whose memory
// is the CPU's; the current stream and device of a thread; memory for temporaries. The linker puts these in
// place of what the bindings ask for (--wrap).
#include <ATen/core/TensorBase.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "control.h"
#include "cuda_emulation/runtime.h"

namespace {

using cuda_emulation::runtime;
using torch::stable::Tensor;
namespace detail = torch::stable::detail;

std::mutex mutex;
struct OfThread {
  int device = 0;   // of torch's own runtime
  int target = -1;  // the device that torch takes for current all the same
  std::map<int, int> streams;
};
std::map<std::thread::id, OfThread> threads;  // thread_local is taken for shared memory

OfThread& of_thread() {
  const std::lock_guard lock(mutex);
  return threads[std::this_thread::get_id()];
}

// A tensor as torch's own functions make it, which would look for a GPU first.
Tensor tensor_on(int device, void* memory, void (*release)(void*), const std::vector<int64_t>& sizes,
                 const std::vector<int64_t>& strides, c10::ScalarType dtype) {
  const c10::Device on(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
  const auto meta = c10::scalarTypeToTypeMeta(dtype);
  size_t bytes = meta.itemsize();
  for (size_t i = 0; i < sizes.size(); ++i)
    bytes = sizes[i] > 0 ? bytes + static_cast<size_t>((sizes[i] - 1) * strides[i]) * meta.itemsize() : 0;
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(memory, memory, release, on));
  at::TensorBase tensor = at::detail::make_tensor_base<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), meta);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return Tensor(reinterpret_cast<AtenTensorHandle>(new at::TensorBase(std::move(tensor))));
}

// The memory of a tensor on the CPU as a tensor on a device, or on the current one. The caller keeps the
// first one alive.
Tensor on_device(const Tensor& x, int64_t device) {
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < x.dim(); ++i) {
    sizes.push_back(x.size(i));
    strides.push_back(x.stride(i));
  }
  const int chosen = device >= 0 ? static_cast<int>(device) : runtime.current_device();
  return tensor_on(chosen, x.data_ptr(), [](void*) {}, sizes, strides, x.scalar_type());
}

// As torch does it: the device that a thread had before becomes current again where it has a context; else
// torch only remembers that it is to be (c10/cuda/CUDAFunctions.cpp).
struct Guard {
  int before;
};

int torch_device() {
  const int target = of_thread().target, context = runtime.current_context();
  return target >= 0 ? target : context >= 0 ? context : of_thread().device;
}

void torch_set_device(int device) {
  of_thread().device = device;
  of_thread().target = -1;
  runtime.bind_context(device);
}

cudaStream_t torch_stream(int device) {
  return reinterpret_cast<cudaStream_t>(runtime.stream(device, of_thread().streams[device]));
}

int32_t get_stream(int32_t device, void** stream) {
  *stream = torch_stream(device);
  return 0;
}

}  // namespace

void cuda_emulation_set_torch_stream(int device, int stream) { of_thread().streams[device] = stream; }
int cuda_emulation_torch_device() { return torch_device(); }
void cuda_emulation_set_torch_device(int device) { torch_set_device(device); }

extern "C" void* __real_dlopen(const char*, int);
CUDA_EMULATION_HIDDEN void* __wrap_dlopen(const char* name, int flags) {
  if (std::strcmp(name, "libtorch_cuda.so") == 0) return (flags & RTLD_NOLOAD) != 0 ? &mutex : nullptr;
  return __real_dlopen(name, flags);
}
extern "C" void* __real_dlsym(void*, const char*);
CUDA_EMULATION_HIDDEN void* __wrap_dlsym(void* library, const char* name) {
  if (library != &mutex) return __real_dlsym(library, name);
  const bool known = std::strcmp(name, "aoti_torch_get_current_cuda_stream") == 0;
  return known ? reinterpret_cast<void*>(get_stream) : nullptr;
}

CUDA_EMULATION_HIDDEN AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t device,
                                                                           DeviceGuardHandle* guard) {
  const int before = torch_device();
  if (of_thread().target >= 0 || before != device) torch_set_device(device);
  *guard = reinterpret_cast<DeviceGuardHandle>(new Guard{before});
  return AOTI_TORCH_SUCCESS;
}
CUDA_EMULATION_HIDDEN AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle handle) {
  const auto* guard = reinterpret_cast<Guard*>(handle);
  if (torch_device() != guard->before) {
    if (runtime.contexts.count(guard->before) > 0)
      torch_set_device(guard->before);
    else
      of_thread().target = guard->before;
  }
  delete guard;
  return AOTI_TORCH_SUCCESS;
}

// aten::new_empty of a tensor on a device: memory of the current stream's.
CUDA_EMULATION_HIDDEN AOTITorchError __wrap_torch_call_dispatcher(const char* name, const char*,
                                                                  StableIValue* stack, uint64_t) {
  if (std::strcmp(name, "aten::new_empty") != 0) return AOTI_TORCH_FAILURE;
  const auto self = detail::to<Tensor>(stack[0]);
  const auto sizes = detail::to<std::vector<int64_t>>(stack[1]);
  const auto dtype = detail::to<std::optional<c10::ScalarType>>(stack[2]).value_or(self.scalar_type());
  int64_t elements = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; elements *= sizes[i]) strides[i] = elements;
  const int device = self.get_device_index();
  void* memory =
      runtime.allocate(static_cast<size_t>(elements) * c10::elementSize(dtype), torch_stream(device));
  if (memory == nullptr) return AOTI_TORCH_FAILURE;
  const auto release = [](void* freed) { runtime.free(freed); };
  stack[0] = detail::from(tensor_on(device, memory, release, sizes, strides, dtype));
  return AOTI_TORCH_SUCCESS;
}

STABLE_TORCH_LIBRARY(effnet_kernels_emulation, m) { m.def("on_device(Tensor x, int device) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(effnet_kernels_emulation, CPU, m) { m.impl("on_device", TORCH_BOX(&on_device)); }
