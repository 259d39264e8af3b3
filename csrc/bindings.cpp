// The Python module gatedrnn._C: facts about this build. The ops themselves are in ops.cpp.
// PyTorch 2.11's own copy of pybind11 refuses to be included beside it; nothing of the stable ABI
// is used here.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "build_facts.h"  // written by setup.py

namespace gatedrnn {

const char* cpu_capability();

namespace {

#define GATEDRNN_STRING_(x) #x
#define GATEDRNN_STRING(x) GATEDRNN_STRING_(x)

const char* compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " GATEDRNN_STRING(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

// As cpu/dispatch.cpp chooses them, best first.
pybind11::tuple cpu_capabilities() {
#if defined(__x86_64__)
  return pybind11::make_tuple("avx512", "avx2", "portable");
#else
  return pybind11::make_tuple("portable");
#endif
}

pybind11::dict build_info() {
#if defined(_MSVC_LANG)
  constexpr long standard = _MSVC_LANG;
#else
  constexpr long standard = __cplusplus;
#endif
  pybind11::dict info;
  info["version"] = GATEDRNN_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = standard;
  info["torch_version"] = TORCH_VERSION;
  info["sanitizers"] = GATEDRNN_SANITIZERS;
  info["cpu_capabilities"] = cpu_capabilities();
  info["cpu_capability"] = cpu_capability();
#if GATEDRNN_WITH_CUDA
  info["cuda_version"] = GATEDRNN_CUDA_VERSION;
  info["cuda_architectures"] = pybind11::make_tuple(GATEDRNN_CUDA_ARCHITECTURES);
#else
  info["cuda_version"] = pybind11::none();
  info["cuda_architectures"] = pybind11::tuple();
#endif
  return info;
}

}  // namespace
}  // namespace gatedrnn

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native library of gatedrnn: registers torch.ops.gatedrnn.* when imported.";
  m.def("build_info", &gatedrnn::build_info,
        "How this library was built and what it uses on this machine.");
}
