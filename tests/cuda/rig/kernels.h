// The kernels that the cards can run, by name. Apart from machine.h, since NVIDIA's headers and host_cuda.h both define
// CUDA's types.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace rig {

// The work of a launch, with a copy of its parameters; empty where no kernel of this name is known.
//
// `sizes` are the bytes of each parameter, as the compiled image has them.
std::function<void()> kernel_work(const std::string& name, const std::vector<std::size_t>& sizes, unsigned grid,
                                  unsigned block, void** params);

// The bytes of the argument of one of fastdp's kernels; 0 where there is none of this name.
std::size_t argument_nbytes(const std::string& name);

// A rank has come to its next collective of a group, and waits there for the other ranks.
void rank_comes(std::uintptr_t group, int rank, int ranks);

// No rank waits there any more.
void group_ends(std::uintptr_t group);

// NCCL's element types by their codes: the bytes of one, and sums in rank order, of fp16 and bf16 in fp32.
std::size_t item_nbytes(int dtype);
void sum(void* result, const std::vector<const void*>& sources, std::size_t count, int dtype);

}  // namespace rig
