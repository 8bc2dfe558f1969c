#include "kernels/cuda/cuda_linear.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>

namespace moed::cuda {
namespace {

// What a choice of kernel depends on: rows, in, out, the strides of x and y, accumulate, alignment.
using Key = std::array<int64_t, 7>;

struct Choice {
  bool found = false;
  cublasLtMatmulAlgo_t algorithm{};
};

// Rows that share a choice: as many as make no difference to which kernel is good.
int32_t rounded_rows(int32_t rows) {
  const int32_t step = rows <= 128 ? 16 : rows <= 1024 ? 128 : 512;
  return (rows + step - 1) / step * step;
}

uint64_t alignment_bytes(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return std::min<uint64_t>(address & (~address + 1), 256);
}

// Column-major as the library wants it: y^T [out, rows] = W [out, in] x^T [in, rows], where a row-major matrix is its
// own transpose. Lives on the stack.
struct Call {
  cublasLtMatmulDescOpaque_t product{};
  cublasLtMatrixLayoutOpaque_t w{};
  cublasLtMatrixLayoutOpaque_t x{};
  cublasLtMatrixLayoutOpaque_t y{};

  // rows: those of x and y, or as many as stand for them.
  bool describe(int64_t rows, const Matrix<const Bf16>& from, const LinearWeights& weights, const Matrix<float>& to) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    return cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)) ==
               CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutInit(&w, CUDA_R_16BF, weights.in, weights.out, weights.in) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutInit(&x, CUDA_R_16BF, weights.in, rows, from.stride) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutInit(&y, CUDA_R_32F, weights.out, rows, to.stride) == CUBLAS_STATUS_SUCCESS;
  }
};

Choice choose(cublasLtHandle_t library, Call& call, uint64_t alignment) {
  cublasLtMatmulPreferenceOpaque_t preference{};
  if (cublasLtMatmulPreferenceInit(&preference) != CUBLAS_STATUS_SUCCESS) return {};
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
    return cublasLtMatmulPreferenceSetAttribute(&preference, what, &value, sizeof(value)) == CUBLAS_STATUS_SUCCESS;
  };
  bool set = prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(CudaLinear::kWorkspaceBytes));
  for (const auto matrix : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    set = set && prefer(matrix, static_cast<uint32_t>(alignment));
  }
  cublasLtMatmulHeuristicResult_t best{};
  int num_found = 0;
  if (!set || cublasLtMatmulAlgoGetHeuristic(library, &call.product, &call.w, &call.x, &call.y, &call.y, &preference, 1,
                                             &best, &num_found) != CUBLAS_STATUS_SUCCESS) {
    return {};
  }
  return {num_found == 1 && best.state == CUBLAS_STATUS_SUCCESS, best.algo};
}

}  // namespace

struct CudaLinear::State {
  cublasLtHandle_t library = nullptr;
  std::map<Key, Choice> choices;
  ~State() {
    if (library != nullptr) cublasLtDestroy(library);
  }

  // The kernel for `rows` rows; asked for once.
  const Choice& choice(int64_t rows, Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate,
                       Matrix<float> y) {
    const uint64_t alignment =
        std::min({alignment_bytes(x.data), alignment_bytes(weights.weight), alignment_bytes(y.data)});
    const Key key{
        rows, weights.in, weights.out, x.stride, y.stride, accumulate ? 1 : 0, static_cast<int64_t>(alignment)};
    const auto [entry, is_new] = choices.try_emplace(key);
    if (is_new) {
      Call call;
      if (call.describe(rows, x, weights, y)) entry->second = choose(library, call, alignment);
    }
    return entry->second;
  }
};

StatusOr<std::unique_ptr<CudaLinear>> CudaLinear::make() {
  auto state = std::make_unique<State>();
  const cublasStatus_t status = cublasLtCreate(&state->library);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return Status(StatusCode::kUnavailable,
                  std::string("device cuda: cublasLt does not start: ") + cublasLtGetStatusString(status), "device");
  }
  return std::unique_ptr<CudaLinear>(new CudaLinear(std::move(state)));
}

CudaLinear::CudaLinear(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudaLinear::~CudaLinear() = default;

bool CudaLinear::run(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
                     const Launch& launch) {
  Call call;
  if (launch.workspace_bytes < kWorkspaceBytes || !call.describe(x.rows, x, weights, y)) return false;
  const float one = 1.0F;
  const float kept = accumulate ? 1.0F : 0.0F;
  // First the kernel of the rounded rows, then, should it refuse these, their own.
  for (const int32_t rows : {rounded_rows(x.rows), x.rows}) {
    const Choice& choice = state_->choice(rows, x, weights, accumulate, y);
    if (choice.found &&
        cublasLtMatmul(state_->library, &call.product, &one, weights.weight, &call.w, x.data, &call.x, &kept, y.data,
                       &call.y, y.data, &call.y, &choice.algorithm, launch.workspace, kWorkspaceBytes,
                       static_cast<cudaStream_t>(launch.stream)) == CUBLAS_STATUS_SUCCESS) {
      return true;
    }
  }
  // What the library tried in vain is not the fault of the launches that come next.
  static_cast<void>(cudaGetLastError());
  return false;
}

}  // namespace moed::cuda
