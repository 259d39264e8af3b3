// Makes the device of a tensor current, and finds PyTorch's current stream there.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace gatedrnn::cuda {

class __attribute__((visibility("hidden"))) DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& x)
      : guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {}
  void* stream() const { return stream_; }

 private:
  // This function is in libtorch_cuda, which a CPU-only PyTorch lacks. It is looked up at the first
  // CUDA tensor, so that one binary loads with either PyTorch.
  static void* current_stream(int32_t device) {
    using Entry = AOTITorchError (*)(int32_t, void**);
    static const Entry entry = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Entry>(
          dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(entry != nullptr, "this PyTorch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(entry(device, &stream) == TORCH_SUCCESS, "no current stream on cuda:", device);
    return stream;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

}  // namespace gatedrnn::cuda
