// What every kernel file shares: element types, 16-byte packs, grid-stride indices, system-scope signals.
//
// The same source compiles in two ways. NVRTC compiles it for a GPU without any header from the CUDA
// toolkit, so fp16 and bf16 are plain 16-bit structs here, converted by PTX or bit arithmetic.
// tests/kernels/host_cuda.h compiles it with g++ for the CPU (it defines FASTDP_HOST_CUDA).
//
// Arithmetic is fp32 with one rounding at the store. The build passes --fmad=false: no kernel is bound by
// arithmetic, and without contraction each result equals its NumPy twin's bit for bit.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct half_t { u16 bits; };  // IEEE binary16
struct bf16_t { u16 bits; };  // upper half of an IEEE binary32

#ifdef FASTDP_HOST_CUDA
#define FASTDP_KERNEL(name, Args, threads, ...) \
    extern "C" void name(const Args args) { __VA_ARGS__; } \
    static host_cuda::Registration register_##name(#name, name);
#else
// One kernel entry. Its only parameter is a struct by value, so that launch/functions.py packs a single object.
#define FASTDP_KERNEL(name, Args, threads, ...) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args args) { \
        __VA_ARGS__; \
    }
#endif

// ---- bits and conversions -----------------------------------------------------------------------------

__device__ __forceinline__ u32 float_bits(float x) {
#ifdef FASTDP_HOST_CUDA
    return host_cuda::bit_cast<u32>(x);
#else
    return __float_as_uint(x);
#endif
}

__device__ __forceinline__ float bits_float(u32 x) {
#ifdef FASTDP_HOST_CUDA
    return host_cuda::bit_cast<float>(x);
#else
    return __uint_as_float(x);
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(u8 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(bf16_t x) { return bits_float(static_cast<u32>(x.bits) << 16); }
__device__ __forceinline__ float to_float(half_t x) {
#ifdef FASTDP_HOST_CUDA
    return host_cuda::half_to_float(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

template <class T> struct From;
template <> struct From<float> {
    static __device__ __forceinline__ float of(float x) { return x; }
};
template <> struct From<half_t> {  // round to nearest even, overflow to infinity
    static __device__ __forceinline__ half_t of(float x) {
#ifdef FASTDP_HOST_CUDA
        return half_t{host_cuda::float_to_half(x)};
#else
        u16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return half_t{y};
#endif
    }
};
// Rounds to nearest even. Every NaN becomes 0x7fc0, as in fastdp/bfloat16.py and torch on the host; the hardware's
// cvt.rn.bf16, which needs sm_80, gives 0x7fff.
template <> struct From<bf16_t> {
    static __device__ __forceinline__ bf16_t of(float x) {
        const u32 bits = float_bits(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16_t{static_cast<u16>(0x7fc0)};
        return bf16_t{static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
    }
};
template <class T> __device__ __forceinline__ T from_float(float x) { return From<T>::of(x); }

// ---- packs: a fixed number of elements, in one access if the address is aligned -------------------------

template <int nbytes> struct Word;
template <> struct Word<1> { using type = u8; };
template <> struct Word<2> { using type = u16; };
template <> struct Word<4> { using type = u32; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <class T, int count> struct Pack {
    using word = typename Word<count * sizeof(T)>::type;
    union {
        word bits;
        T at[count];
    };
};

template <class T> struct elements_of { static constexpr int per_pack = 16 / static_cast<int>(sizeof(T)); };

__device__ __forceinline__ u32 misalignment(const void* p, u32 alignment) {
    return static_cast<u32>(reinterpret_cast<u64>(p)) & (alignment - 1);
}

// Elements [pack * count, pack * count + count) of an array of n; those past the end are zero.
template <class T, int count>
__device__ __forceinline__ Pack<T, count> load_pack(const T* array, i64 pack, i64 n) {
    using word = typename Pack<T, count>::word;
    Pack<T, count> x;
    const i64 first = pack * count;
    if (first + count <= n && misalignment(array, sizeof(word)) == 0) {
        x.bits = *reinterpret_cast<const word*>(array + first);
        return x;
    }
#pragma unroll
    for (int e = 0; e < count; ++e) x.at[e] = first + e < n ? array[first + e] : T{};
    return x;
}

template <class T, int count>
__device__ __forceinline__ void store_pack(T* array, i64 pack, i64 n, const Pack<T, count>& x) {
    using word = typename Pack<T, count>::word;
    const i64 first = pack * count;
    if (first + count <= n && misalignment(array, sizeof(word)) == 0) {
        *reinterpret_cast<word*>(array + first) = x.bits;
        return;
    }
#pragma unroll
    for (int e = 0; e < count; ++e) {
        if (first + e < n) array[first + e] = x.at[e];
    }
}

__device__ __forceinline__ i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
__device__ __forceinline__ i64 grid_thread() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 grid_threads() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// ---- signals ------------------------------------------------------------------------------------------
// PTX memory model: a release at system scope publishes all earlier writes, including those that the other
// threads of the block made before a __syncthreads. The acquire that reads the flag sees all of them.

__device__ __forceinline__ void store_release_system(u64* p, u64 value) {
#ifdef FASTDP_HOST_CUDA
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
#else
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ u64 load_acquire_system(const u64* p) {
#ifdef FASTDP_HOST_CUDA
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#else
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
#endif
}

__device__ __forceinline__ u32 add_acquire_release_device(u32* p, u32 value) {
#ifdef FASTDP_HOST_CUDA
    return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
#else
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
    return old;
#endif
}

// Flags that the host reads after synchronizing: whole words, no ordering guaranteed.
__device__ __forceinline__ void store_relaxed_system(u32* p, u32 value) {
#ifdef FASTDP_HOST_CUDA
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
#else
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
#endif
}

__device__ __forceinline__ u32 load_relaxed_system(const u32* p) {
#ifdef FASTDP_HOST_CUDA
    return __atomic_load_n(p, __ATOMIC_RELAXED);
#else
    u32 value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
#endif
}
