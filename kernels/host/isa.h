#pragma once

#include "kernels/host/kernel_table.h"

namespace moed {

// An instruction set that this build has kernels for.
struct Isa {
  const char* name;
  const KernelTable& (*kernels)();
  bool (*supported)();  // by this CPU and its operating system
  bool bf16_products;   // has instructions for them: oneDNN is worth asking
};

struct IsaList {
  const Isa* data;
  int count;
};

// Best first; the last one runs everywhere.
IsaList isas();

const KernelTable& avx512_bf16_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx2_kernels();
const KernelTable& portable_kernels();

}  // namespace moed
