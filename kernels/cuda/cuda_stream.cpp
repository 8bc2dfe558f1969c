#include "kernels/cuda/cuda_stream.h"

#include <cstring>

#include "base/check.h"

namespace moed::cuda {

using std::chrono::steady_clock;

Epoch::Epoch(Context& context) : context_(context) {
  context_.activate();
  context_.check(cudaEventCreate(&event_), "creating an event");
  context_.check(cudaEventRecord(event_, nullptr), "recording an event");
  context_.check(cudaEventSynchronize(event_), "waiting for an event");
  at_ = steady_clock::now();
}

Epoch::~Epoch() {
  context_.activate();
  if (event_ != nullptr) context_.check(cudaEventDestroy(event_), "destroying an event");
}

CudaEvent::CudaEvent(Context& context, const Epoch& epoch, bool timed)
    : context_(context), epoch_(epoch), timed_(timed) {
  context_.activate();
  context_.check(cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming),
                 "creating an event");
}

CudaEvent::~CudaEvent() {
  if (event_ != nullptr) context_.check(cudaEventDestroy(event_), "destroying an event");
}

// CUDA takes an event that was never recorded for one that is done.
void CudaEvent::check_recorded(const char* what) const {
  MOED_CHECK(recorder_ != Recorder::kNone) << what << ": the event was never recorded";
}

bool CudaEvent::done() const {
  check_recorded("done");
  if (recorder_ == Recorder::kHost) return true;
  const cudaError_t state = cudaEventQuery(event_);
  if (state == cudaErrorNotReady) {
    cudaGetLastError();  // an answer, which must not look like a failed launch to whoever asks next
    return false;
  }
  // What has failed will never be ready: whoever polls goes on to join() and learns of it.
  context_.check(state, "asking for an event");
  return true;
}

Status CudaEvent::join() {
  check_recorded("join");
  if (recorder_ == Recorder::kStream) {
    context_.activate();
    context_.check(cudaEventSynchronize(event_), "waiting for the device");
  }
  return context_.status();
}

double CudaEvent::elapsed_us(cudaEvent_t earlier) const {
  float ms = 0.0F;
  context_.check(cudaEventElapsedTime(&ms, earlier, event_), "reading the time between two events");
  return 1000.0 * static_cast<double>(ms);
}

double CudaEvent::at_us() const {
  if (recorder_ == Recorder::kStream) return elapsed_us(epoch_.event());
  return std::chrono::duration<double, std::micro>(at_ - epoch_.at()).count();
}

double CudaEvent::us_since(const Event& earlier) const {
  const auto& begin = static_cast<const CudaEvent&>(earlier);
  MOED_CHECK(timed_ && begin.timed_) << "us_since of an event without a time";
  begin.check_recorded("us_since");
  check_recorded("us_since");
  // Straight from one to the other where that can be: the time since the epoch is a float that gets coarse.
  if (recorder_ == Recorder::kStream && begin.recorder_ == Recorder::kStream) return elapsed_us(begin.event_);
  return at_us() - begin.at_us();
}

void CudaEvent::record_on(cudaStream_t stream) {
  context_.activate();
  context_.check(cudaEventRecord(event_, stream), "recording an event");
  recorder_ = Recorder::kStream;
}

void CudaEvent::record_on_host() {
  at_ = steady_clock::now();
  recorder_ = Recorder::kHost;
}

void CudaEvent::hold(cudaStream_t stream) const {
  check_recorded("wait");
  if (recorder_ == Recorder::kHost) return;
  context_.activate();
  context_.check(cudaStreamWaitEvent(stream, event_, 0), "waiting for an event on a stream");
}

CudaStream::CudaStream(Context& context) : context_(context) {
  context_.activate();
  context_.check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
}

CudaStream::~CudaStream() {
  if (stream_ == nullptr) return;
  context_.activate();
  context_.check(cudaStreamSynchronize(stream_), "waiting for a stream");
  context_.check(cudaStreamDestroy(stream_), "destroying a stream");
}

void CudaStream::copy(void* target, const void* source, int64_t bytes) {
  if (bytes == 0) return;
  context_.activate();
  context_.check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream_), "copying");
}

void HostLaneStream::copy(void* target, const void* source, int64_t bytes) {
  if (bytes > 0) std::memcpy(target, source, bytes);
}

void HostLaneStream::wait(const Event& event) {
  MOED_CHECK(event.done()) << "the host lane waits for an event that the host has not joined";
}

}  // namespace moed::cuda
