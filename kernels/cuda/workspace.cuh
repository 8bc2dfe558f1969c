#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.cuh"

namespace moed::cuda {

constexpr int64_t kWorkspaceAlignment = 256;

constexpr int64_t align_up(int64_t bytes) { return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment; }

// What each op takes of the workspace, bytes. An op has it whole.
int64_t route_workspace_bytes(const OpLimits& limits);
int64_t expert_workspace_bytes(const OpLimits& limits);
int64_t attention_workspace_bytes(const OpLimits& limits);

// Writes past nothing: dies when an op needs more than the workspace has, naming it.
void check_workspace(const char* op, int64_t bytes, const Launch& launch);

}  // namespace moed::cuda
