// The Python module that steers a library of kernels. MODULE is its name.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "control.h"

namespace py = pybind11;

#if defined(WITH_FIXTURES)
namespace {

using Floats = py::array_t<float, py::array::c_style>;

void run(const std::string& name, const Floats& in, Floats out, int blocks, int threads,
         size_t dynamic_shared) {
  const char* error =
      cuda_emulation_run_fixture(name.c_str(), in.data(), out.mutable_data(), static_cast<int>(out.size()),
                                 blocks, threads, dynamic_shared);
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace
#endif

PYBIND11_MODULE(MODULE, m) {
  m.def("set_seed", cuda_emulation_set_seed, py::arg("seed"),
        "The order of threads, warps and blocks follows from the seed and the number of launches since.");
  m.def(
      "set_device",
      [](int capability, int multiprocessors) {
        if (!cuda_emulation_set_device(capability, multiprocessors))
          throw py::value_error("no such device is described");
      },
      py::arg("capability"), py::kw_only(), py::arg("multiprocessors") = 0,
      "The device that launchers see: 80, 86, 89, 90 (the default), 100 or 120; with few multiprocessors "
      "they cut small problems like large ones.");
  m.def("forget_barrier", cuda_emulation_forget_barrier, py::arg("file"), py::arg("line"),
        "The barrier in that line lets everybody pass. `file` is the end of a path; line 0 forgets none.");
  m.def("set_patience", cuda_emulation_set_patience, py::arg("seconds"),
        "Processor time that a thread may run without waiting or returning; 30 s.");
  m.def("launches", cuda_emulation_launches, "Kernels launched since the last set_seed().");
  m.def("switches", cuda_emulation_switches,
        "Changes from one fiber to another since the library was loaded.");
#if defined(WITH_FIXTURES)
  m.def("run", run, py::arg("name"), py::arg("input"), py::arg("out"), py::kw_only(), py::arg("blocks") = 1,
        py::arg("threads") = 256, py::arg("dynamic_shared") = 0,
        "Launches a kernel of fixtures.cu over `input`; fills `out`.");
#endif
}
