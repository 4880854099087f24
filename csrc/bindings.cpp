// sdr_kernels._C: launches a registered kernel by its name. No kernel is in here, and it imports without a GPU.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "registry.h"

namespace py = pybind11;

namespace {

struct Kernel {
  const void* address;
  std::string parameters;  // a letter each, as add_kernel is told
};

union Argument {
  int64_t integer;  // or a pointer
  float real;
};

constexpr size_t kOptInBytes = 48 * 1024;  // CUDA grants so much dynamic shared memory without being asked

std::map<std::string, Kernel>& table() {  // inside a function: other files' initialisers fill it in any order
  static std::map<std::string, Kernel> kernels;
  return kernels;
}

// Makes a device current, and at the end the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && device != previous_) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

std::vector<Argument> pack(const std::string& name, const std::string& parameters, const py::sequence& args) {
  if (args.size() != parameters.size()) {
    throw std::runtime_error(name + " takes " + std::to_string(parameters.size()) + " arguments, got " +
                             std::to_string(args.size()));
  }
  std::vector<Argument> values(args.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const py::object arg = args[i];
    const bool real = parameters[i] == 'f';
    if (real ? !py::isinstance<py::float_>(arg) : !py::isinstance<py::int_>(arg)) {
      throw std::runtime_error("argument " + std::to_string(i) + " of " + name + " must be " +
                               (real ? "a float" : "an int") + ", got " + std::string(py::repr(arg)));
    }
    if (real) {
      values[i].real = arg.cast<float>();
    } else {
      values[i].integer = arg.cast<int64_t>();
    }
  }
  return values;
}

cudaError_t launch_packed(const void* kernel, int device, dim3 grid, dim3 block, size_t shared_bytes, uintptr_t stream,
                          std::vector<Argument>& values) {
  std::vector<void*> pointers;
  for (Argument& value : values) pointers.push_back(&value);
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  if (shared_bytes > kOptInBytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  return cudaLaunchKernel(kernel, grid, block, pointers.data(), shared_bytes, reinterpret_cast<cudaStream_t>(stream));
}

void launch(const std::string& name, int device, std::array<unsigned, 3> grid, std::array<unsigned, 3> block,
            size_t shared_bytes, uintptr_t stream, const py::sequence& args) {
  const auto found = table().find(name);
  if (found == table().end()) throw std::runtime_error("sdr_kernels._C has no kernel " + name);
  const Kernel& kernel = found->second;
  std::vector<Argument> values = pack(name, kernel.parameters, args);
  cudaError_t status;
  {
    const py::gil_scoped_release release;  // a full launch queue blocks
    status = launch_packed(kernel.address, device, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                           shared_bytes, stream, values);
  }
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) {
    throw std::runtime_error(name + " needs an NVIDIA GPU and its driver: " + cudaGetErrorString(status));
  }
  if (status != cudaSuccess) {
    throw std::runtime_error(name + " on cuda:" + std::to_string(device) + ": " + cudaGetErrorString(status));
  }
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : table()) names.push_back(name);
  return names;
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("cuda"_a = SDR_CUDA_VERSION, "architectures"_a = SDR_ARCHITECTURES,
                  "host_compiler"_a = SDR_HOST_COMPILER, "csrc"_a = SDR_CSRC);
}

int driver_version() {
  int version = 0;
  const cudaError_t status = cudaDriverGetVersion(&version);
  if (status != cudaSuccess) throw std::runtime_error(std::string("driver_version: ") + cudaGetErrorString(status));
  return version;
}

}  // namespace

bool add_kernel(const char* name, const void* address, const char* parameters) {
  table()[name] = {address, parameters};
  return true;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CUDA kernels of csrc/.";
  m.def("launch", &launch, py::arg("name"), py::arg("device"), py::arg("grid"), py::arg("block"),
        py::arg("shared_bytes"), py::arg("stream"), py::arg("args"),
        "Launch a kernel of kernels() on a stream of a device; args: an int for a pointer or an int64_t, a float for a "
        "float. RuntimeError for an unknown name, wrong arguments and every CUDA error.");
  m.def("kernels", &kernels, "Names of all kernels, sorted.");
  m.def("build_info", &build_info, "CUDA's version, architectures, host compiler and csrc's digest of this build.");
  m.def("driver_version", &driver_version, "1000 * major + 10 * minor of the CUDA that the driver is for; 0 without.");
}
