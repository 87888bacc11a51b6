// The Python module that steers a library of kernels. MODULE is its name.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "control.h"

namespace py = pybind11;

namespace {

// The devices that somebody has used since forget_contexts().
std::set<int> contexts() {
  std::set<int> devices;
  for (int i = 0; i < 64; ++i)
    if (cuda_emulation_contexts() >> i & 1) devices.insert(i);
  return devices;
}

using Cost = std::tuple<std::string, std::string, bool, uint64_t, uint64_t, uint64_t>;

std::vector<Cost> costs() {
  std::vector<Cost> all;
  cuda_emulation_costs(
      [](const cuda_emulation::Cost& c, void* data) {
        static_cast<std::vector<Cost>*>(data)->emplace_back(c.kernel, c.line, c.shared, c.requests,
                                                            c.transactions, c.ideal);
      },
      &all);
  return all;
}

std::set<std::pair<int, int>> waiting() {
  std::set<std::pair<int, int>> streams;
  cuda_emulation_waiting(
      [](int device, int stream, void* data) {
        static_cast<std::set<std::pair<int, int>>*>(data)->emplace(device, stream);
      },
      &streams);
  return streams;
}

std::pair<int, int> launch_bounds(uint64_t address) {
  int threads = 0, blocks = 0;
  cuda_emulation_launch_bounds(address, &threads, &blocks);
  return {threads, blocks};
}

#if defined(WITH_FIXTURES)
using Floats = py::array_t<float, py::array::c_style>;

void run(const std::string& name, const Floats& in, Floats out, int blocks, int threads,
         size_t dynamic_shared) {
  const float* from = in.data();
  float* to = out.mutable_data();
  const int size = static_cast<int>(out.size());
  const py::gil_scoped_release others_may_run;
  const char* error =
      cuda_emulation_run_fixture(name.c_str(), from, to, size, blocks, threads, dynamic_shared);
  if (error != nullptr) throw std::runtime_error(error);
}
#endif

}  // namespace

PYBIND11_MODULE(MODULE, m) {
  using py::arg;
  m.def("set_seed", cuda_emulation_set_seed, arg("seed"),
        "The order of threads, warps and blocks follows from the seed and the number of launches since.");
  m.def("set_natural_order", cuda_emulation_set_natural_order, arg("natural"),
        "Threads and blocks run in the order of their numbers; nothing is drawn.");
  m.def(
      "set_device",
      [](int capability, int multiprocessors) {
        const int device = cuda_emulation_find_device(capability, multiprocessors);
        if (device < 0) throw py::value_error("no such device is described");
        cuda_emulation_choose_device(device);
        return device;
      },
      arg("capability"), py::kw_only(), arg("multiprocessors") = 0,
      "Makes the device of that capability current in this thread: 80, 86, 89, 90 (the one that build.load() "
      "chooses), 100 or 120. With few multiprocessors launchers cut small problems like large ones. Returns "
      "its "
      "number.");
  m.def("current_device", cuda_emulation_current_device, "The runtime's, in this thread.");
  m.def("pop_context", cuda_emulation_pop_context,
        "No context is current in this thread any more, as when another library has put its own away.");
  m.def("contexts", contexts, "The devices that have been used since forget_contexts().");
  m.def("forget_contexts", cuda_emulation_forget_contexts);
  m.def("set_pause", cuda_emulation_set_pause, arg("seconds"),
        "How long a thread rests before and after it changes a kernel's limit of shared memory; 0.");
  m.def("defer", cuda_emulation_defer, arg("deferred"),
        "Launches wait in their streams until synchronize(); what is freed meanwhile is full of NaNs from "
        "there "
        "on.");
  m.def("deferred", cuda_emulation_deferred);
  m.def("waiting", waiting, "Device and number of the streams with deferred launches.");
  m.def("synchronize", cuda_emulation_synchronize, py::call_guard<py::gil_scoped_release>());
  m.def("forget_barrier", cuda_emulation_forget_barrier, arg("file"), arg("line"),
        "The barrier in that line lets everybody pass. `file` is the end of a path; line 0 forgets none.");
  m.def("set_patience", cuda_emulation_set_patience, arg("seconds"),
        "Processor time that a thread may run without waiting or returning; 30 s.");
  m.def("launches", cuda_emulation_launches, "Kernels launched since the last set_seed().");
  m.def("switches", cuda_emulation_switches,
        "Changes from one fiber to another since the library was loaded.");
  m.def("count", cuda_emulation_count, arg("counting"),
        "Whether costs are counted from here on; those so far are forgotten.");
  m.def("costs", costs,
        "(kernel, line, in shared memory, requests, wavefronts or sectors, those of the same bytes side by "
        "side), "
        "of the first block of every launch.");
  m.def("launch_bounds", launch_bounds, arg("address"),
        "The __launch_bounds__, threads and blocks, of the function at an address in the library; zeros "
        "without.");
#if defined(WITH_FIXTURES)
  m.def("run", run, arg("name"), arg("input"), arg("out"), py::kw_only(), arg("blocks") = 1,
        arg("threads") = 256, arg("dynamic_shared") = 0,
        "Launches a kernel of fixtures.cu over `input`; fills `out`.");
#else
  m.def("set_torch_stream", cuda_emulation_set_torch_stream, arg("device"), arg("stream"),
        "Makes a stream the current one of a device in this thread, as torch sees it.");
  m.def("torch_device", cuda_emulation_torch_device, "The current device of this thread, as torch sees it.");
  m.def("set_torch_device", cuda_emulation_set_torch_device, arg("device"), "torch.cuda.set_device().");
#endif
}
