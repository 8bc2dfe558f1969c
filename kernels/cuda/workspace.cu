#include "kernels/cuda/workspace.cuh"

#include <algorithm>

#include "base/check.h"

namespace moed::cuda {

int64_t workspace_bytes(const OpLimits& limits) {
  return std::max({route_workspace_bytes(limits), expert_workspace_bytes(limits), attention_workspace_bytes(limits)});
}

void load_kernels() {
  load_attention_kernels();
  load_expert_ffn_kernels();
  load_group_kernels();
  load_linear_kernels();
  load_rope_append_kernels();
  load_route_kernels();
  load_rows_kernels();
  load_sample_kernels();
}

void check_workspace(const char* op, int64_t bytes, const Launch& launch) {
  MOED_CHECK(bytes <= launch.workspace_bytes)
      << op << ": needs " << bytes << " bytes of workspace, there are " << launch.workspace_bytes;
}

}  // namespace moed::cuda
