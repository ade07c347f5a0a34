// The two calls of the profiler, which a wheel of their own declares.
#pragma once
#include <cuda_runtime_api.h>

extern "C" cudaError_t cudaProfilerStart(void);
extern "C" cudaError_t cudaProfilerStop(void);
