// Kernels that keep or break the rules, one each: what the emulation must run right or report.
//
// torch.ops.gatedrnn_toys.run(name, data, numbers) runs one; Python says what must come of it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "cuda/runtime.cuh"

namespace toys {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 128;

// Shared memory in which all has been written once.
__device__ __forceinline__ int* written_room() {
  int* room = reinterpret_cast<int*>(dynamic_shared_memory());
  room[threadIdx.x] = 0;
  __syncthreads();
  return room;
}

// Reverses each block's kThreads values through shared memory; a barrier between is the point.
template <bool kBarrier>
__global__ void reverse_kernel(int* data) {
  int* room = written_room();
  int* own = data + blockIdx.x * kThreads;
  room[threadIdx.x] = own[threadIdx.x];
  if (kBarrier) __syncthreads();
  own[threadIdx.x] = room[kThreads - 1 - threadIdx.x];
}

// The same within a warp of 32 values. A vote makes lanes meet, and orders no memory.
template <bool kBarrier, bool kVote>
__global__ void reverse_warp_kernel(int* data) {
  int* room = written_room();
  room[threadIdx.x] = data[threadIdx.x];
  if (kBarrier) __syncwarp();
  if (kVote) __any_sync(0xffffffff, 1);
  data[threadIdx.x] = room[threadIdx.x ^ 31];
}

// Two warps in a ring of two slots: the second reads what the first wrote a step ago. A barrier at
// each step is right; only one warp's own, at each step, keeps neither in step with the other.
template <bool kBarrier>
__global__ void pipeline_kernel(int* data, int steps) {
  int* room = written_room();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = 0;
  for (int step = 0; step <= steps; ++step) {
    if (warp == 0 && step < steps) room[step % 2 * 32 + lane] = step + 1;
    if (warp == 1 && step > 0) sum += room[(step - 1) % 2 * 32 + (lane ^ 1)];
    if (kBarrier)
      __syncthreads();
    else
      __syncwarp();
  }
  if (warp == 1) data[lane] = sum;
}

// Sums by shuffles of every kind: each lane of `data` gets its warp's sum.
template <class T>
__global__ void warp_sum_kernel(T* data) {
  T value = data[threadIdx.x];
  value += __shfl_xor_sync(0xffffffff, value, 16);
  for (int delta = 8; delta > 2; delta /= 2) value += __shfl_down_sync(0xffffffff, value, delta);
  T pair = value + __shfl_down_sync(0xffffffff, value, 2);
  pair += __shfl_down_sync(0xffffffff, pair, 1);
  data[threadIdx.x] = __shfl_sync(0xffffffff, pair, 0);
}

// Rows of 32: what up, down, xor and idx give in pieces of 8 lanes, and the votes.
__global__ void shuffles_kernel(int* data) {
  const int lane = threadIdx.x;
  data[lane] = __shfl_up_sync(0xffffffff, lane, 3, 8);
  data[32 + lane] = __shfl_down_sync(0xffffffff, lane, 3, 8);
  data[64 + lane] = __shfl_xor_sync(0xffffffff, lane, 12, 8);
  data[96 + lane] = __shfl_sync(0xffffffff, lane, 11, 8);
  data[128 + lane] = static_cast<int>(__ballot_sync(0xffffffff, lane % 3 == 0));
  data[160 + lane] = __any_sync(0xffffffff, lane == 5) + 2 * __all_sync(0xffffffff, lane < 31) +
                     4 * __any_sync(0xffffffff, 0) + 8 * __all_sync(0xffffffff, lane < 32);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  data[192 + lane] = __shfl_xor_sync(half, lane, 15);
  data[224 + lane] = __syncthreads_or(lane == 9) + 2 * __syncthreads_or(0);
}

// Blocks in the order of their tickets: data[0] counts tickets, data[1] whose turn it is; each
// appends its ticket. Plain reads of data[1] would be a race without the acquire.
__global__ void ticket_kernel(int* data) {
  int* ticket = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x == 0) *ticket = atomicAdd(&data[0], 1);
  __syncthreads();
  if (threadIdx.x == 0)
    while (load_acquire(&data[1]) != *ticket) __nanosleep(20);
  __syncthreads();
  data[2 + *ticket * static_cast<int>(blockDim.x) + threadIdx.x] = *ticket;
  __syncthreads();
  if (threadIdx.x == 0) store_release(&data[1], *ticket + 1);
}

// One block writes, the next reads what the flag promises. The warp must meet before its flag.
template <bool kMeet>
__global__ void promise_kernel(int* data) {
  int* flag = data + 64;
  if (blockIdx.x == 0) {
    data[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
    if (kMeet) __syncwarp();
    if (threadIdx.x == 0) store_release(flag, 1);
  } else {
    while (load_acquire(flag) == 0) __nanosleep(20);
    data[32 + threadIdx.x] = data[threadIdx.x ^ 31];
  }
}

// The flag itself, which is no longer one if its write is plain.
template <bool kRelease>
__global__ void flag_kernel(int* data) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    data[0] = 7;
    if (kRelease)
      store_release(data + 1, 1);
    else
      data[1] = 1;
  } else {
    while (load_acquire(data + 1) == 0) __nanosleep(20);
    data[2] = data[0];
  }
}

// Blocks but the last write and count themselves; the last one waits for all, and adds up.
template <bool kRelease>
__global__ void count_kernel(int* data) {
  if (threadIdx.x != 0) return;
  const int others = static_cast<int>(gridDim.x) - 1, own = static_cast<int>(blockIdx.x);
  if (own < others) {
    data[2 + own] = own + 1;
    if (kRelease)
      add_release(&data[0], 1);
    else
      atomicAdd(&data[0], 1);
    return;
  }
  while (load_acquire(&data[0]) != others) __nanosleep(20);
  for (int i = 0; i < others; ++i) data[1] += data[2 + i];
}

// All read before all write, or some write while others may still read.
template <bool kBarrier>
__global__ void shift_kernel(int* data) {
  const int value = data[(threadIdx.x + 1) % blockDim.x];
  if (kBarrier) __syncthreads();
  data[threadIdx.x] = value;
}

// Bytes of a word, or 16-bit numbers. A separate thread writes each.
template <class S>
__global__ void neighbours_kernel(int* data) {
  reinterpret_cast<S*>(data)[threadIdx.x] = static_cast<S>(threadIdx.x);
}

__global__ void deadlock_kernel(int* data) {
  if (threadIdx.x == 0)
    while (load_acquire(data) == 0) __nanosleep(20);
  __syncthreads();
}

__global__ void ended_kernel(int*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void two_barriers_kernel(int*) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_in_warp_kernel(int*) {
  if (threadIdx.x % 32 == 3)
    __syncthreads();
  else
    __syncwarp();
}

__global__ void ended_lane_kernel(int* data) {
  if (threadIdx.x == 3) return;
  data[0] = __shfl_xor_sync(0xffffffff, 1, 1);
}

__global__ void outside_mask_kernel(int* data) {
  if (threadIdx.x < 16) data[0] = __shfl_sync(0xffff, 1, 20);
}

__global__ void foreign_mask_kernel(int*) { __syncwarp(0xffff); }

__global__ void two_masks_kernel(int*) { __syncwarp(threadIdx.x == 1 ? 0xffffu : 0xffffffffu); }

// A barrier of one place in the source, in two places of the program: as all of the kernels'.
__device__ __forceinline__ void meet() { __syncthreads(); }
__device__ __forceinline__ void meet_warp() { __syncwarp(); }

__global__ void two_meetings_kernel(int* data) {
  if (threadIdx.x < 64) {
    meet();
    data[threadIdx.x] = 1;
  } else {
    meet();
    data[threadIdx.x] = 2;
  }
}

__global__ void two_meetings_of_warp_kernel(int* data) {
  if (threadIdx.x < 16) {
    meet_warp();
    data[threadIdx.x] = 1;
  } else {
    meet_warp();
    data[threadIdx.x] = 2;
  }
}

// One meeting in the source, of which the compiler makes two: it writes the loop out for each half.
__attribute__((optimize("unswitch-loops"))) __global__ void written_twice_kernel(int* data) {
  const bool first = threadIdx.x < 64;
  for (int step = 0; step < data[128]; ++step) {
    if (first)
      data[threadIdx.x] += step;
    else
      data[threadIdx.x] -= step;
    meet();
  }
}

// A vector `at` ints from the start, which is aligned only at multiples of its size.
struct alignas(16) Four {
  int values[4];
};
template <class V>
__global__ void vector_kernel(int* data, int at) {
  if (threadIdx.x == 0)
    *reinterpret_cast<V*>(data + 16) = *gatedrnn::cuda::aligned(reinterpret_cast<V*>(data + at));
}
__global__ void number_kernel(int* data, int at) {
  if (threadIdx.x == 0)
    *reinterpret_cast<int64_t*>(data + 16) = *reinterpret_cast<int64_t*>(data + at);
}

// Half of the shared memory is written, `read` of its ints are read.
__global__ void unwritten_kernel(int* data, int read) {
  int* room = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x < 16) room[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = static_cast<int>(threadIdx.x) < read ? max(room[threadIdx.x], 0) : 0;
}

// The same by packs, which may move along what is not there.
__global__ void unwritten_pack_kernel(int* data) {
  int* room = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x != 0) return;
  room[0] = 1;
  std::memcpy(data, room, sizeof(Four));
}

// And where that has been said.
__global__ void unset_kernel(int* data) {
  int* room = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x != 0) return;
  gatedrnn::cuda::assume_initialized(room[1]);
  data[0] = room[1];
}

// Half of an int of it.
__global__ void half_written_kernel(int* data) {
  if (threadIdx.x != 0) return;
  *reinterpret_cast<short*>(dynamic_shared_memory()) = 1;
  data[0] = *reinterpret_cast<int*>(dynamic_shared_memory());
}

// Waits for what nobody writes, by every way of reading it.
enum class Wait { kAdd, kPlain };
template <Wait W>
__global__ void wait_kernel(int* data) {
  if (threadIdx.x != 0) return;
  if (W == Wait::kAdd)
    while (atomicAdd(data, 0) == 0) __nanosleep(20);
  else
    while (*static_cast<volatile int*>(data) == 0) {
    }
}
// The last block sees what the first has counted, without a race.
__global__ void counted_kernel(int* data) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0)
    atomicAdd(data, 1);
  else
    while (atomicAdd(data, 0) == 0) __nanosleep(20);
}
__global__ void read_many_flags_kernel(int* data, int count) {
  if (threadIdx.x == 0)
    for (int i = 0; i < count; ++i) data[count] += load_acquire(data + i);
}

__global__ void divide_kernel(int* data) { data[1] = 5 / data[0]; }
__global__ void trap_kernel(int* data) {
  if (data[0] == 0) __builtin_trap();
}

__global__ void shuffle_far_kernel(int* data, int kind, int number) {
  const unsigned all = 0xffffffff;
  const int lane = static_cast<int>(threadIdx.x);
  data[lane] = kind == 0   ? __shfl_up_sync(all, lane, static_cast<unsigned>(number))
               : kind == 1 ? __shfl_down_sync(all, lane, static_cast<unsigned>(number))
               : kind == 2 ? __shfl_xor_sync(all, lane, number)
                           : __shfl_sync(all, lane, 1, number);
}

// Blocks one after the other have a flag at one place, and the later one's promises nothing.
__global__ void flag_of_ended_block_kernel(int* data) {
  int* flag = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    data[0] = 5;
    store_release(flag, 1);
  } else {
    *flag = 0;
    load_acquire(flag);
    data[1] = data[0];
  }
}

__global__ void meetings_kernel(int* data) {
  for (int i = 0; i < 4; ++i) __syncthreads();
  if (blockIdx.x == 0) data[threadIdx.x] = 1;
}

// Shared memory at data[0], an index of ints; reads when data[1] is 0.
__global__ void shared_access_kernel(int* data) {
  volatile int* room = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x != 5) return;
  if (data[1])
    room[data[0]] = 1;
  else
    data[2] = room[data[0]];
}

__global__ void device_access_kernel(int* data, int64_t index) {
  if (threadIdx.x == 5) data[index] = 1;
}

__global__ void deep_kernel(int* data) {
  volatile char room[20 << 10];
  room[0] = 1;
  if (room[0] && data) deep_kernel(data);
  room[1] = 1;
}

__global__ void set_kernel(int* data, int64_t value) {
  if (threadIdx.x != 0) return;
  data[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = static_cast<int>(value);
}

// Values of all kinds through a 16-bit type: data (count) float32, bits (count) int16.
template <class T, T (*narrow)(float), float (*widen)(T)>
__global__ void round_kernel(float* data, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) data[i] = widen(narrow(data[i]));
}

void run(std::string name, Tensor tensor, std::vector<int64_t> numbers) {
  int* data = static_cast<int*>(tensor.mutable_data_ptr());
  const auto number = [&](size_t i) { return numbers.size() > i ? numbers[i] : 0; };
  const auto blocks = static_cast<unsigned>(number(0) ? number(0) : 1);
  const auto one_warp = [&](auto kernel) { launch(kernel, blocks, 32, 4 * 32, nullptr, data); };
  const auto one_block = [&](auto kernel) {
    launch(kernel, blocks, kThreads, 4 * kThreads, nullptr, data);
  };
  if (name == "reverse") return one_block(reverse_kernel<true>);
  if (name == "reverse_without_barrier") return one_block(reverse_kernel<false>);
  if (name == "reverse_warp") return one_warp(reverse_warp_kernel<true, false>);
  if (name == "reverse_warp_without_barrier") return one_warp(reverse_warp_kernel<false, false>);
  if (name == "reverse_warp_by_vote") return one_warp(reverse_warp_kernel<false, true>);
  if (name == "pipeline") return launch(pipeline_kernel<true>, 1, 64, 256, nullptr, data, 30);
  if (name == "pipeline_without_barrier")
    return launch(pipeline_kernel<false>, 1, 64, 256, nullptr, data, 30);
  if (name == "sum_int") return one_warp(warp_sum_kernel<int>);
  if (name == "sum_float")
    return launch(warp_sum_kernel<float>, 1, 32, 0, nullptr, reinterpret_cast<float*>(data));
  if (name == "sum_double")
    return launch(warp_sum_kernel<double>, 1, 32, 0, nullptr, reinterpret_cast<double*>(data));
  if (name == "sum_int64")
    return launch(warp_sum_kernel<int64_t>, 1, 32, 0, nullptr, reinterpret_cast<int64_t*>(data));
  if (name == "shuffles") return one_warp(shuffles_kernel);
  if (name == "ticket") return one_block(ticket_kernel);
  if (name == "promise") return one_warp(promise_kernel<true>);
  if (name == "promise_without_meeting") return one_warp(promise_kernel<false>);
  if (name == "flag") return one_warp(flag_kernel<true>);
  if (name == "flag_by_plain_write") return one_warp(flag_kernel<false>);
  if (name == "count") return one_warp(count_kernel<true>);
  if (name == "count_without_release") return one_warp(count_kernel<false>);
  if (name == "shift") return one_block(shift_kernel<true>);
  if (name == "shift_without_barrier") return one_block(shift_kernel<false>);
  if (name == "neighbours_8") return one_block(neighbours_kernel<uint8_t>);
  if (name == "neighbours_16") return one_block(neighbours_kernel<int16_t>);
  if (name == "deadlock") return one_block(deadlock_kernel);
  if (name == "ended") return one_block(ended_kernel);
  if (name == "two_barriers") return one_block(two_barriers_kernel);
  if (name == "barrier_in_warp") return one_block(barrier_in_warp_kernel);
  if (name == "ended_lane") return one_warp(ended_lane_kernel);
  if (name == "outside_mask") return one_warp(outside_mask_kernel);
  if (name == "foreign_mask") return one_warp(foreign_mask_kernel);
  if (name == "two_masks") return one_warp(two_masks_kernel);
  if (name == "two_meetings") return one_block(two_meetings_kernel);
  if (name == "two_meetings_of_warp") return one_warp(two_meetings_of_warp_kernel);
  if (name == "written_twice") return one_block(written_twice_kernel);
  const auto with_number = [&](auto kernel, int value) {
    launch(kernel, 1, 32, 4 * 32, nullptr, data, value);
  };
  const int first = static_cast<int>(number(0));
  if (name == "vector_of_ints") return with_number(vector_kernel<Four>, first);
  if (name == "float4") return with_number(vector_kernel<float4>, first);
  if (name == "uint2") return with_number(vector_kernel<uint2>, first);
  if (name == "int64") return with_number(number_kernel, first);
  if (name == "unwritten") return with_number(unwritten_kernel, first);
  if (name == "unwritten_pack") return one_warp(unwritten_pack_kernel);
  if (name == "unset") return one_warp(unset_kernel);
  if (name == "half_written") return one_warp(half_written_kernel);
  if (name == "wait_by_adding") return one_warp(wait_kernel<Wait::kAdd>);
  if (name == "wait_by_plain_reads") return one_warp(wait_kernel<Wait::kPlain>);
  if (name == "counted") return one_warp(counted_kernel);
  if (name == "read_many_flags") return with_number(read_many_flags_kernel, first);
  if (name == "divide") return one_warp(divide_kernel);
  if (name == "trap") return one_warp(trap_kernel);
  if (name == "shuffle_far")
    return launch(shuffle_far_kernel, 1, 32, 0, nullptr, data, first, static_cast<int>(number(1)));
  if (name == "flag_of_ended_block") return one_warp(flag_of_ended_block_kernel);
  if (name == "meetings") return one_block(meetings_kernel);
  if (name == "shared_access") {
    if (number(0) > 48 << 10)
      cudaFuncSetAttribute(shared_access_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(number(0)));
    return launch(shared_access_kernel, 1, 32, static_cast<size_t>(number(0)), nullptr, data);
  }
  if (name == "device_access")
    return launch(device_access_kernel, 1, 32, 0, nullptr, data, number(0));
  if (name == "deep") return one_warp(deep_kernel);
  if (name == "half")
    return launch(round_kernel<__half, __float2half_rn, __half2float>, 1, 32, 0, nullptr,
                  reinterpret_cast<float*>(data), tensor.numel());
  if (name == "bfloat16")
    return launch(round_kernel<__nv_bfloat16, __float2bfloat16_rn, __bfloat162float>, 1, 32, 0,
                  nullptr, reinterpret_cast<float*>(data), tensor.numel());
  if (name == "grid") return launch(set_kernel, dim3(2, 3, 4), 32, 0, nullptr, data, int64_t{7});
  if (name == "threads")
    return launch(set_kernel, 1, static_cast<unsigned>(number(0)), 0, nullptr, data, 1);
  if (name == "shared_bytes") {
    if (number(1)) {
      const cudaError_t error = cudaFuncSetAttribute(
          set_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(number(1)));
      STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
    }
    return launch(set_kernel, 1, 32, static_cast<size_t>(number(0)), nullptr, data, 1);
  }
  STD_TORCH_CHECK(false, "no such toy: ", name);
}

}  // namespace

STABLE_TORCH_LIBRARY(gatedrnn_toys, m) {
  m.def("run(str name, Tensor(a!) data, int[] numbers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gatedrnn_toys, CPU, m) { m.impl("run", TORCH_BOX(&run)); }

}  // namespace toys
