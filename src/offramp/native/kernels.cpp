// Decoder blocks as short programs over registers, run by a few threads inside one call.
//
// A token costs what its weights cost to read; everything here follows from that. Weights are read where they lie (bf16
// and float32: the model's own memory), widened in registers and multiplied with float32 activations; weights in eight
// or four bits are multiplied with activations in eight bits, whose sums are whole numbers. All sums are taken in an order that
// depends on the weights' width alone: neither the number of rows in a call nor the number of threads changes a bit of
// any row, so that a drafted token and its check agree exactly.
//
// A plain C interface, no torch and no Python: `native/kernels.py` mirrors the structs below, all of whose fields are
// eight bytes wide. Vectors are the compiler's own, as long as the machine's. Sums have sixteen lanes on every machine;
// shorter vectors make them in parts.

#include <pthread.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

// Lanes of one register, and how many sums of them stay in registers beside what they are made of.
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;
#elif defined(__AVX2__)
constexpr int LANES = 8, SUMS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, SUMS = 24;
#else
constexpr int LANES = 4, SUMS = 12;
#endif
constexpr int PARTS = 16 / LANES;
typedef float f32s __attribute__((vector_size(4 * LANES)));
typedef int32_t i32s __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32s __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16s __attribute__((vector_size(2 * LANES)));
typedef int16_t i16s __attribute__((vector_size(2 * LANES)));
typedef int8_t i8s __attribute__((vector_size(LANES)));

// ------------------------------------------------------------------------------------------------ the interface

extern "C" {

enum Format : int64_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum NormKind : int64_t { NO_NORM = 0, RMS = 1, LAYER = 2 };
enum Activation : int64_t { IDENTITY = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4, RELU_SQUARED = 5 };
enum Kind : int64_t { LINEAR = 0, NORM = 1, ROTATE = 2, ATTEND = 3 };
enum Into : int64_t { STORE = 0, ADD = 1, ACTIVATE = 2, GATE = 3 };

struct Matrix {              // [rows, cols], y = W x + bias
    int64_t format, rows, cols;
    int64_t stride;          // bytes from one row to the next; INT4: a sixteenth of those of sixteen rows
    const void* data;        // INT8: as `Blocks` says; INT4: as `Groups` says
    const float* bias;       // or null
};

struct Norm {
    int64_t kind, cols;
    double eps;
    const float* weight;     // or null: ones
    const float* bias;       // or null
};

struct Op {
    int64_t kind;
    int64_t src, dst;        // registers; 0 is the residual state
    int64_t first;           // NORM: from which column of `src` on
    int64_t into;            // LINEAR, NORM: what becomes of the result
    int64_t activation;
    int64_t count;           // LINEAR: matrices, side by side in `dst`
    double multiplier;       // of what is added to the residual
    Norm norm;               // LINEAR: of the input, first. NORM: this. ROTATE: of each query head
    Norm key_norm;           // ROTATE: of each key head
    Matrix matrix[3];
    // ROTATE, ATTEND
    int64_t heads, kv_heads, head_dim;
    int64_t rotation;        // which table; -1: none
    int64_t rotated;         // leading dimensions of a head that turn
    int64_t interleaved;     // neighbours turn together, not halves
    int64_t window;          // 0: none
    double scale, cap;       // of scores; cap 0: none
    const float* sinks;      // one per head, or null
    int64_t memory;          // to the encoder's output, not to the text
    int64_t biased;          // scores get the call's bias by distance
    double clip;             // ROTATE: heads are clamped to this size first; 0: not
    int64_t headwise;        // ROTATE: each head's norm has weights of its own
};

struct Model {
    int64_t width, registers;
    const int64_t* widths;   // floats per row of each register
    const Op* ops;
    const int64_t* program;  // where each program begins, and the last one ends
    int64_t kv_format;       // F32 or BF16
};

struct Rotation {
    const float* cosines;    // [positions, rotated / 2]
    const float* sines;
};

struct Readout {             // of A states after one layer
    int64_t rows, width;     // A states of D numbers
    int64_t count;           // K logits each
    int64_t threads;
    double scale;            // of what the head reads
    double factor, cap;      // of logits, which are bent to lie below the cap; 0: none
    const float* hidden;     // [A, D]
    int64_t lenses;
    const Matrix* lens;      // applied one after the other and added to the state, first
    const Norm* norm;        // or null
    const Matrix* head;      // or null: only `inputs` are wanted
    const int64_t* ids;      // which rows of the head, -1 for none; or null: all
    int64_t ids_step;        // from one state's ids to the next one's; 0: they share them
    float* inputs;           // [A, D]: what the head reads; or null
    float* logits;           // [A, K], or null
    float* best;             // [A, 2]: the two largest logits; or null: logits are all that is wanted
    int64_t* tokens;         // [A, 2]: whose they are; of equal ones, the lowest
    float* normaliser;       // [A]: logsumexp; NaN if a logit is NaN or +inf
};

struct Call {
    int64_t first, last;     // programs [first, last)
    int64_t rows;            // tokens, M
    int64_t layer;           // of the first program: which cache it has
    int64_t capacity;        // slots per row of the caches, a multiple of 16
    int64_t threads;
    float* hidden;           // [M, D], in and out
    const int64_t* batch;    // [M]: the cache row of each token
    const int64_t* slot;     // [M]: its slot there; a row's slots are filled from 0 on
    const int64_t* position; // [M]: what its heads turn by
    void* const* keys;       // per layer [B, heads, capacity / 16, head_dim, 16]
    void* const* values;     // per layer [B, heads, capacity, head_dim]
    const Rotation* rotations;
    const float* distances;  // bias of scores by head and distance, [heads, reach]
    int64_t reach;
    int64_t memory_capacity;         // the same for the encoder's output
    const int64_t* memory_lengths;   // [B]
    void* const* memory_keys;
    void* const* memory_values;
};

struct Cycles {              // tokens of one row: drafted by blocks before the model's first one, then checked by the model
    Readout mix;             // of [embedding; what was read one position before], both normed: the drafter's states
    Call call;               // its programs on them; places of all tokens that may come, one after another
    Readout test;            // of its last state
    Call deep;               // the model's programs, at the same places
    Readout check;           // of its states; what its head reads goes to `before`
    const void* embeddings;  // [tokens, D]
    int64_t format;          // F32 or BF16
    int64_t count;           // tokens that are there and that the drafter has not gone over, n
    int64_t* tokens;         // [n + cycles * (most + 1) or n + room]: those, and behind them what comes
    float* before;           // [n or most + 1, D]: what was read one position before each that the drafter has yet to see
    float* both;             // [n or most + 1, 2 D], what `mix` reads
    int64_t most;            // drafts in a row
    int64_t confidence;      // 0: 1 always; 1: the largest probability; 2: its lead
    double threshold;        // above it drafts go on
    double accept;           // below 1: second choices stand that are at least so likely, relative to the first
    int64_t room;            // tokens that may still come
    int64_t cycles;          // at most
    const int64_t* ends;     // tokens behind which nothing comes
    int64_t ends_count;
    float* confidences;      // [cycles, most]: of drafts
    float* logprobs;         // [cycles, most + 1]: of tokens that stand
    int64_t* notes;          // [cycles, 6]: tokens the drafter went over first, drafts made, drafts above the threshold,
                             // tokens checked, drafts that stand, whether numbers chose all that stands
    double* seconds;         // [2]: blocks and all that drafts take, readouts of the check
    int64_t made;            // cycles
};

struct Exit {                // where a token may leave, or, behind all of them, where it has to
    int64_t layer;
    Readout test;            // of one state
};

struct Stretch {             // tokens of one row, one after another, each as deep as it needs to go
    Call call;               // of one token at a time; places of all that may come, one after another
    Call fill;               // of tokens that skipped blocks
    const void* embeddings;  // [tokens, D]
    int64_t format;          // F32 or BF16
    int64_t token;           // the last one that is known
    int64_t most;            // tokens
    int64_t exits;           // the last layer among them
    Exit* exit;              // ascending
    const double* thresholds;  // [most, exits - 1]: above them a token leaves
    int64_t confidence;      // 1: the largest probability; 2: its lead
    int64_t keep;            // best tokens of the first test that later ones score; 0: as many as the first
    int64_t* kept;           // [keep + skipped], those behind are always scored
    const int64_t* skip;     // columns of the first test that are not ranked
    int64_t skipped;
    int64_t blocks;          // before the programs that fill
    float* frozen;           // [tokens that left early, D]: their states
    int64_t* frozen_layer;   // where each left
    int64_t* frozen_slot;
    int64_t* frozen_position;
    int64_t frozen_count;
    int64_t* filled;         // [layers]: how many of these each layer has dealt with
    const int64_t* ends;     // tokens behind which nothing comes
    int64_t ends_count;
    int64_t* tokens;         // [most]
    int64_t* layers;         // [most]: where each left
    int64_t* tests;          // [most]: how many were made
    float* confidences;      // [most]: of the last one, NaN if none was made
    float* normalisers;      // [most]
    int64_t* fills;          // [most * layers, 4]: token, first layer, one behind the last one, tokens filled
    int64_t fills_count;
    double* seconds;         // [5]: blocks, fills, readouts of all tokens and of some, choice of kept ones
    int64_t made;
};
}

namespace {

// ------------------------------------------------------------------------------------------------ threads

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Weights that this thread will read after the stage at hand: fetched while it waits, so that memory never rests.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    bool fetch() {
        for (int i = 0; i < 4 && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
        return at < end;
    }
};
thread_local Ahead ahead;

// Where threads wait for what another one does: they spin, which is quickest while each has a core, then sleep, since
// the one waited for may need it. Who had to sleep spins for half as long the next time, as often as that happens: two
// processes that spin on the same cores would wait for whole slices of time at every stage.
class Gate {
  public:
    template <class Done, class Meanwhile> void wait(int64_t turns, Done done, Meanwhile meanwhile) {
        thread_local int halvings = 0;
        for (int64_t turn = 0; turn < turns >> halvings; ++turn) {
            if (done()) {
                halvings = std::max(halvings - 1, 0);
                return;
            }
            meanwhile();
        }
        halvings = std::min(halvings + 1, 8);
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, done);
        asleep_.fetch_sub(1);
    }

    // To be called once what is waited for is done: both are sequentially consistent, so that one side sees the other.
    void open() {
        if (asleep_.load() == 0) return;
        std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
    }

  private:
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<int64_t> asleep_{0};
};

struct Barrier {
    std::atomic<int64_t> arrived{0}, phase{0};
    Gate gate;
    void wait(int64_t threads) {
        const int64_t now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1);
            gate.open();
            return;
        }
        gate.wait(4000, [&] { return phase.load() != now; }, [] { if (!ahead.fetch()) pause(); });
    }
};

// What the threads of one call share.
struct Team {
    int64_t threads;
    Barrier barrier;
    std::vector<std::atomic<int64_t>> taken;  // one counter per stage of the call, and one for its preparation
    size_t stages;
    Team(int64_t threads, size_t stages) : threads(threads), taken(2 * stages), stages(stages) {
        for (auto& counter : taken) counter.store(0, std::memory_order_relaxed);
    }
};

typedef void (*Task)(void* argument, int64_t thread);

// Workers that wait for tasks.
class Pool {
  public:
    void run(int64_t threads, Task task, void* argument) {
        std::lock_guard<std::mutex> one(calls_);
        while (static_cast<int64_t>(workers_) < threads - 1) {
            const int64_t id = ++workers_;
            const uint64_t seen = epoch_.load();
            std::thread([this, id, seen] { work(id, seen); }).detach();
        }
        if (threads > 1) {
            task_ = task, argument_ = argument, threads_ = threads;
            left_.store(workers_, std::memory_order_relaxed);
            epoch_.fetch_add(1);
            begin_.open();
        }
        task(argument, 0);
        if (threads > 1) end_.wait(4000, [this] { return left_.load() == 0; }, pause);
    }

  private:
    void work(int64_t id, uint64_t seen) {
        for (;;) {
            begin_.wait(20000, [&] { return epoch_.load() != seen; }, pause);
            seen = epoch_.load(std::memory_order_acquire);
            if (id < threads_) task_(argument_, id);
            if (left_.fetch_sub(1) == 1) end_.open();
        }
    }

    std::mutex calls_;
    Gate begin_, end_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int64_t> left_{0};
    int64_t workers_ = 0, threads_ = 1;
    Task task_ = nullptr;
    void* argument_ = nullptr;
};

std::atomic<Pool*> the_pool{nullptr};

// After a fork the child has no workers: it gets a pool of its own, and the old one is left as it lies.
Pool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    (void)registered;
    Pool* have = the_pool.load();
    if (!have) {
        Pool* made = new Pool;
        if (the_pool.compare_exchange_strong(have, made)) have = made;
        else delete made;
    }
    return *have;
}

// ------------------------------------------------------------------------------------------------ arithmetic

inline f32s splat(float x) { return x - f32s{}; }

template <class V = f32s>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Has a vector loaded once, into a register, where the compiler would rather load it for each of its uses.
inline f32s held(f32s v) {
#if defined(__AVX2__)
    asm("" : "+v"(v));
#endif
    return v;
}

inline void store(void* p, f32s v) { std::memcpy(p, &v, sizeof v); }

struct Sum {  // in sixteen lanes
    f32s part[PARTS];
};

// Always in this order: eight and eight, four and four, two and two, one and one.
inline float sum(const Sum& lanes) {
    float v[16];
    std::memcpy(v, &lanes, sizeof v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

#if defined(__clang__)
#define SHUFFLED(I, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(I, a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// The sums of eight, each in that order.
#if defined(__AVX512F__)
inline f32s fold8(f32s a, f32s b) {
    return SHUFFLED(i32s, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLED(i32s, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

inline f32s fold4(f32s a, f32s b) {
    return SHUFFLED(i32s, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLED(i32s, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

inline void sums8(const Sum* of, float* out) {
    f32s v[8];
    std::memcpy(v, of, sizeof v);
    const f32s a = fold4(fold8(v[0], v[1]), fold8(v[2], v[3])), b = fold4(fold8(v[4], v[5]), fold8(v[6], v[7]));
    const f32s c = SHUFFLED(i32s, a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                   SHUFFLED(i32s, a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    const f32s d = SHUFFLED(i32s, c, c, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
                   SHUFFLED(i32s, c, c, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
    std::memcpy(out, &d, 32);
}
#elif defined(__AVX2__)
inline void sums8(const Sum* of, float* out) {
    f32s eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) eight[i] = of[i].part[0] + of[i].part[1];
    for (int i = 0; i < 4; ++i) {
        const f32s a = eight[2 * i], b = eight[2 * i + 1];
        four[i] = SHUFFLED(i32s, a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLED(i32s, a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 2; ++i) {
        const f32s a = four[2 * i], b = four[2 * i + 1];
        two[i] = SHUFFLED(i32s, a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLED(i32s, a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    const f32s a = two[0], b = two[1];
    const f32s one = SHUFFLED(i32s, a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLED(i32s, a, b, 1, 3, 9, 11, 5, 7, 13, 15);
    store(out, SHUFFLED(i32s, one, one, 0, 4, 1, 5, 2, 6, 3, 7));
}
#else
inline void sums8(const Sum* of, float* out) {
    for (int i = 0; i < 8; ++i) out[i] = sum(of[i]);
}
#endif

inline f32s choose(i32s mask, f32s yes, f32s no) { return (f32s)(((i32s)yes & mask) | ((i32s)no & ~mask)); }

// e^x to about two units in the last place; 0 below -87, clamped above 88.
inline f32s exponential(f32s x) {
    const i32s gone = x < splat(-87.0f);
    x = choose(x > splat(88.0f), splat(88.0f), x);
    x = choose(gone, splat(0.0f), x);
    const f32s magic = splat(12582912.0f);
    const f32s shifted = x * splat(1.44269504088896341f) + magic;  // rounds to a whole number in the low bits
    const f32s n = shifted - magic;
    f32s r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    f32s p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const i32s power = ((i32s)shifted - (i32s)magic) << 23;
    return choose(gone, splat(0.0f), (f32s)((i32s)p + power));
}

inline f32s capped(f32s x, float cap) {  // cap * tanh(x / cap)
    x /= splat(cap);
    const i32s minus = (i32s)splat(-0.0f), sign = (i32s)x & minus;
    const f32s t = exponential(splat(-2.0f) * (f32s)((i32s)x & ~minus));
    return splat(cap) * (f32s)((i32s)((splat(1.0f) - t) / (splat(1.0f) + t)) | sign);
}

inline f32s activated(int64_t kind, f32s x) {
    const f32s one = splat(1.0f), zero = splat(0.0f);
    switch (kind) {
        case SILU: return x / (one + exponential(-x));
        case GELU_TANH: return x / (one + exponential(x * (splat(-1.5957691216f) - splat(0.0713548163f) * x * x)));
        case GELU: {
            f32s y;
            for (int i = 0; i < LANES; ++i) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
            return y;
        }
        case RELU: return choose(x > zero, x, zero);
        case RELU_SQUARED: {
            const f32s y = choose(x > zero, x, zero);
            return y * y;
        }
        default: return x;
    }
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u >> 16) | 64);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline f32s widened(const float* p) { return load(p); }

inline f32s widened(const uint16_t* p) {
#if defined(__AVX512F__)
    return (f32s)((u32s)_mm512_cvtepu16_epi32(load<__m256i>(p)) << 16);
#elif defined(__AVX2__)
    return (f32s)((u32s)_mm256_cvtepu16_epi32(load<__m128i>(p)) << 16);
#else
    return (f32s)(__builtin_convertvector(load<u16s>(p), u32s) << 16);
#endif
}

inline f32s widened(const int16_t* p) {  // whole numbers
#if defined(__AVX512F__)
    return __builtin_convertvector((i32s)_mm512_cvtepi16_epi32(load<__m256i>(p)), f32s);
#elif defined(__AVX2__)
    return __builtin_convertvector((i32s)_mm256_cvtepi16_epi32(load<__m128i>(p)), f32s);
#else
    return __builtin_convertvector(load<i16s>(p), f32s);
#endif
}

inline float widened_one(float x) { return x; }

inline float widened_one(uint16_t x) {
    const uint32_t u = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// ------------------------------------------------------------------------------------------------ formats of weights

// Weights come in steps of 32 columns, as two times 16 lanes. Inputs lie so that both match: in natural order, but for
// bf16, whose lanes are the even and the odd columns of a step: the high halves of its 32-bit words, and the low ones.

struct WeightsF32 {
    typedef float Element;
    const float* row;
    WeightsF32() = default;
    explicit WeightsF32(const void* row) : row(static_cast<const float*>(row)) {}
    f32s low(int64_t c, int part) const { return load(row + c + part * LANES); }
    f32s high(int64_t c, int part) const { return load(row + c + 16 + part * LANES); }
};

struct WeightsBF16 {
    typedef uint16_t Element;
    const uint16_t* row;
    WeightsBF16() = default;
    explicit WeightsBF16(const void* row) : row(static_cast<const uint16_t*>(row)) {}
    u32s words(int64_t c, int part) const { return load<u32s>(row + c + part * 2 * LANES); }
    f32s low(int64_t c, int part) const { return (f32s)(words(c, part) << 16); }
    f32s high(int64_t c, int part) const { return (f32s)(words(c, part) & 0xffff0000u); }
};

inline int64_t padded(int64_t cols) { return (cols + 63) / 64 * 64; }

// Weights in eight bits lie in equal blocks of up to twelve steps of 64 columns. In a step, byte j of lane i is column
// 16 j + i, kept with 128 added; behind the steps of a block come sixteen scales in bf16, one per lane: four columns of
// each step share one. Inputs are rounded to eight bits in the same way, with a scale per lane of their own, behind which
// lies what the added 128s come to. Before they are rounded, both are turned (see `turn`), which their products undo.
struct Blocks {
    int64_t count, steps;  // steps of one block
    explicit Blocks(int64_t cols) : count((padded(cols) / 64 + 11) / 12), steps((padded(cols) / 64 + count - 1) / count) {}
    int64_t weights() const { return steps * 64 + 32; }      // bytes of one
    int64_t inputs() const { return steps * 64 + 2 * 64; }
};

// Adds to each lane the products of its four bytes. What the 128s in w add is left to the inputs' offsets, unless they are
// taken off here.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr int LEFT = 128;
inline i32s dot4(i32s acc, u32s w, i32s x) {
    return (i32s)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
#elif defined(__AVX2__)
constexpr int LEFT = 128;
inline i32s dot4(i32s acc, u32s w, i32s x) {
    __m256i a[LANES / 8], b[LANES / 8], c[LANES / 8];
    std::memcpy(a, &acc, sizeof a), std::memcpy(b, &w, sizeof b), std::memcpy(c, &x, sizeof c);
    for (int i = 0; i < LANES / 8; ++i) {  // neighbours add up to no more than 127: two products fit sixteen bits
        const __m256i pairs = _mm256_maddubs_epi16(b[i], c[i]);
        a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    std::memcpy(&acc, a, sizeof a);
    return acc;
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int LEFT = 0;
inline i32s dot4(i32s acc, u32s w, i32s x) {
    return (i32s)vdotq_s32((int32x4_t)acc, (int8x16_t)(w ^ 0x80808080u), (int8x16_t)x);
}
#else
constexpr int LEFT = 128;
inline i32s dot4(i32s acc, u32s w, i32s x) {
    for (int j = 0; j < 4; ++j) acc += (i32s)((w >> (8 * j)) & 255) * ((i32s)((u32s)x << (24 - 8 * j)) >> 24);
    return acc;
}
#endif

// Weights in four bits lie in tiles of sixteen rows, one to a lane, which hold groups of 32 columns one after another: four
// steps of eight columns, where byte j of a lane has column j in its lower half and column 4 + j in its upper one, then a
// scale and a shift per row, as whole numbers of sixteen bits. The units of these, two per row, stand at a tile's end. A
// weight is scale * number + shift, so that a model whose weights have sixteen values in each group is read as it is. Inputs
// are rounded to eight bits, with a scale per group; their sum, for the shifts, comes with it. A row of inputs of 1e30 and
// more may be infinite, or NaN, where it should not be yet.
struct Groups {
    int64_t count;
    explicit Groups(int64_t cols) : count((cols + 31) / 32) {}
    static constexpr int64_t WEIGHTS = 320;                              // bytes of one
    int64_t weights() const { return count * WEIGHTS + 128; }            // of sixteen rows
    int64_t inputs() const { return (count * 40 + 63) / 64 * 64; }       // of one row
};

// Products of numbers of four bits, without sign, and of bytes: eight times four for each lane.
struct Products {
#if defined(__AVX2__) && !(defined(__AVX512VNNI__) && defined(__AVX512F__))
    __m256i pairs[LANES / 8] = {};  // two products are at most 15 * 127 * 2, so that eight of them fit sixteen bits
    void add(u32s w, i32s x) {
        __m256i b[LANES / 8], c[LANES / 8];
        std::memcpy(b, &w, sizeof b), std::memcpy(c, &x, sizeof c);
        for (int i = 0; i < LANES / 8; ++i) {
            pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(b[i], c[i]));
            asm("" : "+v"(pairs[i]));  // now, or the compiler keeps all products and adds them in the end
        }
    }
    i32s total() const {
        i32s sum;
        __m256i a[LANES / 8];
        for (int i = 0; i < LANES / 8; ++i) a[i] = _mm256_madd_epi16(pairs[i], _mm256_set1_epi16(1));
        std::memcpy(&sum, a, sizeof sum);
        return sum;
    }
#else
    i32s sum = {};
    void add(u32s w, i32s x) { sum = dot4(sum, LEFT ? w : w ^ 0x80808080u, x); }
    i32s total() const { return sum; }
#endif
};

// Rows [M, cols] of input as the kernels want them: in blocks of up to eight, zeros behind their ends, and within a
// block sixteen columns of all its rows side by side. In eight bits each row is for itself.
struct Inputs {
    const float* packed;
    int64_t rows, block, stride;  // stride: floats from one row to the next, were the block's other rows not there
    int64_t size(int64_t first) const { return std::min(block, rows - first); }
};

// Floats of memory that a row of a matrix's inputs takes.
inline int64_t packed_size(const Matrix& a) {
    const Blocks blocks(a.cols);
    if (a.format == INT4) return Groups(a.cols).inputs() / 4;
    return a.format == INT8 ? blocks.count * blocks.inputs() / 4 : padded(a.cols);
}

// Multiplies the columns of each lane, `count` of them, a multiple of four, by symmetric orthogonal matrices, Hadamard's:
// of the largest power of two that fits, then of the largest that fits the rest. What one column has too much of, all of
// them share then, so that it does not cost the others of its lane their accuracy.
inline void turn(f32s* columns, int64_t count) {
    for (int64_t size; count; columns += size, count -= size) {
        for (size = 1; 2 * size <= count;) size *= 2;
        const f32s scale = splat(1 / std::sqrt(static_cast<float>(size)));
        for (int64_t i = 0; i < size; i += 4) {
            f32s* const of = columns + i;
            const f32s a = of[0] + of[1], b = of[0] - of[1], c = of[2] + of[3], d = of[2] - of[3];
            of[0] = (a + c) * scale, of[1] = (b + d) * scale, of[2] = (a - c) * scale, of[3] = (b - d) * scale;
        }
        for (int64_t half = 4; half < size; half *= 2)
            for (int64_t first = 0; first < size; first += 2 * half)
#pragma GCC unroll 4
                for (int64_t i = first; i < first + half; ++i) {
                    const f32s a = columns[i], b = columns[i + half];
                    columns[i] = a + b, columns[i + half] = a - b;
                }
    }
}

// Turns a row of inputs and rounds it to eight bits, the largest number and sum of two neighbours of each lane to 126, of
// which half is a whole number, too. So two products with weights, which AVX2 adds in sixteen bits, fit these. Other
// processors round alike. A lane with a number that is not finite is NaN.
void pack_bytes(const float* x, int64_t cols, char* into) {
    const Blocks blocks(cols);
    const int64_t count = blocks.steps * 4;
    f32s columns[48];
    for (int64_t c = 0; c < cols; c += count * 16, into += blocks.inputs())
        for (int part = 0; part < PARTS; ++part) {
            char* to = into + part * LANES * 4;
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = c + i * 16 + part * LANES;
                float ends[LANES] = {};
                if (at + LANES > cols && at < cols) std::copy(x + at, x + cols, ends);
                columns[i] = load(at + LANES > cols ? ends : x + at);
            }
            turn(columns, count);
            f32s most = {}, wrong = {};
            auto at_least = [&](f32s x) {
                const f32s size = (f32s)((i32s)x & 0x7fffffff);
                most = choose(size > most, size, most);
            };
            for (int64_t i = 0; i < count; i += 2) {
                const f32s one = columns[i], two = columns[i + 1];
                at_least(one), at_least(two), at_least(one + two);
                wrong += (one + two) * splat(0.0f);
            }
            const f32s scale = most * splat(1.0f / 126), magic = splat(12582912.0f);
            const f32s inverse = choose(most > splat(1e-30f), splat(126.0f) / most, splat(0.0f));
            const i32s sound = wrong == wrong;
            i32s total = {};
            for (int64_t s = 0; s < blocks.steps; ++s) {
                i32s bytes = {};
                for (int j = 0; j < 4; ++j) {
                    const i32s q = ((i32s)(columns[4 * s + j] * inverse + magic) - (i32s)magic) & sound;
                    total += q;
                    bytes |= (q & 255) << (8 * j);
                }
                std::memcpy(to + s * 64, &bytes, sizeof bytes);
            }
            const i32s offset = total * -LEFT;
            store(to + blocks.steps * 64, scale + wrong);
            std::memcpy(to + blocks.steps * 64 + 64, &offset, sizeof offset);
        }
}

// Rounds a row of inputs to eight bits, the largest number of each group of 32 columns to 127. Behind them come the scale
// and the sum of each group. A group with a number that is not finite is NaN.
void pack_groups(const float* x, int64_t cols, char* into) {
    const Groups groups(cols);
    float* behind = reinterpret_cast<float*>(into + groups.count * 32);
    for (int64_t c = 0; c < cols; c += 32, into += 32, behind += 2) {
        float ends[32] = {};
        if (c + 32 > cols) std::copy(x + c, x + cols, ends);
        const float* from = c + 32 > cols ? ends : x + c;
        f32s most = {}, wrong = {};
        for (int i = 0; i < 32; i += LANES) {
            const f32s v = load(from + i), size = (f32s)((i32s)v & 0x7fffffff);
            most = choose(size > most, size, most);
            wrong += v * splat(0.0f);
        }
        float largest = 0, not_finite = 0;
        for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]), not_finite += wrong[i];
        const f32s inverse = splat(largest > 1e-30f && not_finite == 0 ? 127.0f / largest : 0.0f), magic = splat(12582912.0f);
        const i32s sound = splat(not_finite) == splat(not_finite);
        i32s total = {};
        for (int i = 0; i < 32; i += LANES) {
            const i32s q = ((i32s)(load(from + i) * inverse + magic) - (i32s)magic) & sound;
            total += q;
            const i8s bytes = __builtin_convertvector(q, i8s);
            std::memcpy(into + i, &bytes, sizeof bytes);
        }
        int32_t sum = 0;
        for (int i = 0; i < LANES; ++i) sum += total[i];
        behind[0] = largest * (1.0f / 127) + not_finite;
        behind[1] = behind[0] * static_cast<float>(sum);
    }
}

// Puts row m of the inputs in its place.
void pack(const Inputs& in, int64_t m, const float* x, int64_t cols, int64_t format) {
    char* const row = reinterpret_cast<char*>(const_cast<float*>(in.packed) + m * in.stride);
    if (format == INT8) return pack_bytes(x, cols, row);
    if (format == INT4) return pack_groups(x, cols, row);
    const int64_t first = m / in.block * in.block, apart = in.size(first) * 16;
    float* into = const_cast<float*>(in.packed) + first * in.stride + (m - first) * 16;
    auto step = [&](const float* from) {
        if (format == BF16)
            for (int i = 0; i < 16; ++i) into[i] = from[2 * i], into[apart + i] = from[2 * i + 1];
        else
            std::copy(from, from + 16, into), std::copy(from + 16, from + 32, into + apart);
        into += 2 * apart;
    };
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32) step(x + c);
    for (; c < in.stride; c += 32) {
        float ends[32] = {};
        if (c < cols) std::copy(x + c, x + cols, ends);
        step(ends);
    }
}

// ------------------------------------------------------------------------------------------------ matrix times rows

// Rows behind the last whole step of 32 columns, copied with zeros: reading on would leave the matrix.
template <class W>
struct Ends {
    typename W::Element memory[8][32];
    W views[8];
    const W* of(const Matrix& a, const W* rows, int64_t whole) {
        if (whole >= a.cols) return nullptr;
        for (int r = 0; r < 8; ++r) {
            std::memset(memory[r], 0, sizeof memory[r]);
            std::memcpy(memory[r], rows[r].row + whole, (a.cols - whole) * sizeof(typename W::Element));
            views[r] = rows[r];
            views[r].row = memory[r];
        }
        return views;
    }
};

// Memory of one thread, kept from call to call.
struct Scratch {
    std::vector<float> packed, wide, line, sums, lanes;
    static float* at_least(std::vector<float>& v, int64_t size) {  // on a whole cache line: vectors cross none
        if (static_cast<int64_t>(v.size()) < size + 16) v.resize(size + 16);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
    }
};
thread_local Scratch scratch;

// How many parts of M sums are made at once. Weights that come from memory are read line by line, so that all parts are;
// `again`, they are in a near cache, and each part alone leaves room for more rows.
template <int M>
constexpr int parts_of(bool again) { return !again && M * PARTS <= SUMS ? PARTS : 1; }

// As many rows of weights at once as leave room for T parts of their sums with M inputs in registers.
template <int M, int T>
constexpr int ROWS = 8 * M * T < SUMS ? 8 : 4 * M * T <= SUMS ? 4 : 2 * M * T <= SUMS ? 2 : 1;

// Their sums, up to a whole eight.
template <int R, int M>
constexpr int SIZE = (R * M + 7) / 8 * 8;

// Memory that this thread comes to in a moment: the lines of some rows, fetched in the order in which they lie, in which
// memory is quickest.
struct Next {
    const char *const *row, *at;
    int64_t lines, left;
    Next(const char* const* rows, int64_t lines) : row(rows), at(rows ? *rows : nullptr), lines(lines), left(lines) {}
    void fetch() {
        __builtin_prefetch(at, 0, 2);
        at += 64;
        if (--left == 0) left = lines, at = *++row;
    }
};

// The sums of all lanes of R rows of weights times M of inputs, of which `rows` times M go to out[m * stride + r].
template <int R, int M>
inline void put(const Sum* sums, float* out, int64_t stride, int64_t rows) {
    float got[SIZE<R, M>];
#pragma GCC unroll 8
    for (int i = 0; i < R * M; i += 8) sums8(sums + i, got + i);
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R && r < rows; ++r) out[m * stride + r] = got[m * R + r];
}

// R rows of weights times M rows of inputs, in one chain of sixteen lanes for each sum, of which T parts are made at once.
// Behind the last of `whole` columns come those of `ends`. If not all parts are made at once, only columns [from, to) are
// gone over, and the lanes up to there are in `sums`. On the way, the rows `next` are fetched.
template <class W, int R, int M, int T>
__attribute__((noinline)) void tile(const W* w, const W* ends, const char* const* next, const float* first, int64_t from,
                                    int64_t to, int64_t whole, Sum* sums, float* out, int64_t stride, int64_t rows) {
    constexpr int LINES = sizeof(typename W::Element) / 2;  // of a row, in a step
    Next fetched(next, whole / 32 * LINES);
    Sum own[SIZE<R, M>] = {};
    if (T == PARTS) sums = own;
    W v[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) v[r] = w[r];
    for (int part = 0; part < PARTS; part += T) {
        f32s acc[R * M * T];
#pragma GCC unroll 24
        for (int i = 0; i < R * M * T; ++i) acc[i] = T == PARTS || from == 0 ? f32s{} : sums[i / T].part[part + i % T];
        auto half = [&](auto weights, const float* x) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                f32s row[R], inputs[M];
                const float* at = x + (part + t) * LANES;
#pragma GCC unroll 8
                for (int r = 0; r < R && R < M; ++r) row[r] = held(weights(r, part + t));
#pragma GCC unroll 8
                for (int m = 0; m < M && R >= M; ++m) inputs[m] = held(load(at + m * 16));
#pragma GCC unroll 24
                for (int i = 0; i < R * M; ++i) {
                    const int r = R < M ? i % R : i / M, m = R < M ? i / R : i % M;
                    if (R < M && r == 0) inputs[m] = R > 1 ? held(load(at + m * 16)) : load(at + m * 16);
                    if (R >= M && m == 0) row[r] = M > 1 ? held(weights(r, part + t)) : weights(r, part + t);
                    acc[(m * R + r) * T + t] += row[r] * inputs[m];
                }
            }
        };
        auto step = [&](const W* v, int64_t at, const float* x) __attribute__((always_inline)) {
            half([&](int r, int part) __attribute__((always_inline)) { return v[r].low(at, part); }, x);
            half([&](int r, int part) __attribute__((always_inline)) { return v[r].high(at, part); }, x + M * 16);
        };
        for (int64_t c = from; c < to; c += 32) {
            if (next && part == 0) {
#pragma GCC unroll 16
                for (int i = 0; i < R * LINES; ++i) fetched.fetch();
            }
            step(v, c, first + c * M);
        }
        if (ends && to == whole) step(ends, 0, first + whole * M);
#pragma GCC unroll 24
        for (int i = 0; i < R * M * T; ++i) sums[i / T].part[part + i % T] = acc[i];
    }
    if (T < PARTS && to < whole) return;
    put<R, M>(sums, out, stride, rows);
}

// The same of rows in eight bits.
template <int R, int M, int T>
__attribute__((noinline)) void tile(const char* const* w, const char* const* next, const char* x, int64_t apart,
                                    const Blocks& blocks, float* out, int64_t stride, int64_t rows) {
    Next fetched(next, (blocks.count * blocks.weights() + 63) / 64);
    Sum sums[SIZE<R, M>] = {};
    int64_t begin = 0;
    for (int64_t b = 0; b < blocks.count; ++b, x += blocks.inputs(), begin += blocks.weights()) {
        const char* behind = x + blocks.steps * 64;
        const int64_t scales = begin + blocks.steps * 64;
        for (int part = 0; part < PARTS; part += T) {
            constexpr int64_t BYTES = LANES * 4;
            const int64_t bytes = part * BYTES;
            i32s acc[R * M * T];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t)
                        acc[(m * R + r) * T + t] = load<i32s>(behind + m * apart + 64 + bytes + t * BYTES);
            for (int64_t s = 0, at = begin; s < blocks.steps; ++s, at += 64) {
                if (next && part == 0) {
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) fetched.fetch();
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    u32s weights[R];
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) weights[r] = load<u32s>(w[r] + at + bytes + t * BYTES);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        const i32s inputs = load<i32s>(x + m * apart + s * 64 + bytes + t * BYTES);
#pragma GCC unroll 8
                        for (int r = 0; r < R; ++r) {
                            i32s& sum = acc[(m * R + r) * T + t];
                            sum = dot4(sum, weights[r], inputs);
                        }
                    }
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const f32s scale = widened(reinterpret_cast<const uint16_t*>(w[r] + scales) + (part + t) * LANES);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        const f32s both = scale * load(behind + m * apart + bytes + t * BYTES);
                        sums[m * R + r].part[part + t] += __builtin_convertvector(acc[(m * R + r) * T + t], f32s) * both;
                    }
                }
        }
        for (int r = 0; r < R && next; ++r) fetched.fetch();
    }
    put<R, M>(sums, out, stride, rows);
}

// Sixteen rows of weights in four bits times M of inputs, of which T parts of the rows are made at once, to out[m * 16 + row].
// On the way, the tile `next` is fetched.
template <int M, int T>
__attribute__((noinline)) void tile(const char* w, const char* next, const char* x, int64_t apart, const Groups& groups,
                                    float* out) {
    constexpr int64_t BYTES = LANES * 4;
    const float* behind = reinterpret_cast<const float*>(x + groups.count * 32);
    auto four = [](const char* p) __attribute__((always_inline)) { return load<int32_t>(p) - i32s{}; };
    for (int part = 0; part < PARTS; part += T) {
        f32s sums[M * T] = {}, shifts[M * T] = {};
        const char* at = w + part * BYTES;
        for (int64_t g = 0; g < groups.count; ++g, at += Groups::WEIGHTS) {
            const int16_t* numbers = reinterpret_cast<const int16_t*>(w + g * Groups::WEIGHTS + 256) + part * LANES;
            if (next && part == 0)
                for (int i = 0; i < 5; ++i, next += 64) __builtin_prefetch(next, 0, 2);
            Products products[M * T];
#pragma GCC unroll 4
            for (int s = 0; s < 4; ++s) {
                u32s low[T], high[T];
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const u32s both = load<u32s>(at + s * 64 + t * BYTES);
                    low[t] = both & 0x0f0f0f0fu, high[t] = both >> 4 & 0x0f0f0f0fu;
                }
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const char* from = x + m * apart + g * 32 + s * 8;
                    const i32s one = four(from), two = four(from + 4);
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) products[m * T + t].add(low[t], one), products[m * T + t].add(high[t], two);
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const f32s scale = widened(numbers + t * LANES), shift = widened(numbers + 16 + t * LANES);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const float* of = reinterpret_cast<const float*>(reinterpret_cast<const char*>(behind) + m * apart) + 2 * g;
                    sums[m * T + t] += __builtin_convertvector(products[m * T + t].total(), f32s) * (scale * splat(of[0]));
                    shifts[m * T + t] += shift * splat(of[1]);
                }
            }
        }
        const float* units = reinterpret_cast<const float*>(w + groups.count * Groups::WEIGHTS) + part * LANES;
        for (int t = 0; t < T; ++t)
            for (int m = 0; m < M; ++m)
                store(out + m * 16 + (part + t) * LANES, sums[m * T + t] * load(units + t * LANES) +
                                                             shifts[m * T + t] * load(units + 16 + t * LANES));
    }
    for (int i = 0; next && i < 2; ++i, next += 64) __builtin_prefetch(next, 0, 2);
}

// There are `count` rows of weights, and behind the last one the same again up to a whole eight. Where parts come one after
// the other, some columns are gone over at a time, so that the next part and the next rows find the inputs in the first cache.
template <class W, int M, int T>
void tiles(const W* w, const W* ends, const char* const* next, int64_t count, const float* x, int64_t whole,
           float* out, int64_t stride) {
    constexpr int R = ROWS<M, T>;
    const int64_t columns = T == PARTS ? std::max<int64_t>(whole, 1) : 768;
    Sum* sums = nullptr;
    if (T < PARTS) sums = reinterpret_cast<Sum*>(Scratch::at_least(scratch.lanes, (count + R) / R * SIZE<R, M> * 16));
    for (int64_t from = 0; from == 0 || from < whole; from += columns)
        for (int64_t r = 0; r < count; r += R)
            tile<W, R, M, T>(w + r, ends ? ends + r : nullptr, next ? next + r : nullptr, x, from,
                             std::min(whole, from + columns), whole, T < PARTS ? sums + r / R * SIZE<R, M> : nullptr,
                             out + r, stride, count - r);
}

// Calls `work` with each block of inputs, its number of rows as a type, and where its results go.
template <class F>
void each_block(const Inputs& in, float* out, int64_t stride, F work) {
    for (int64_t m = 0; m < in.rows; m += in.block, out += in.block * stride) {
        const float* x = in.packed + m * in.stride;
        switch (in.size(m)) {
            case 1: work(std::integral_constant<int, 1>(), m, x, out); break;
            case 2: work(std::integral_constant<int, 2>(), m, x, out); break;
            case 3: work(std::integral_constant<int, 3>(), m, x, out); break;
            case 4: work(std::integral_constant<int, 4>(), m, x, out); break;
            case 5: work(std::integral_constant<int, 5>(), m, x, out); break;
            case 6: work(std::integral_constant<int, 6>(), m, x, out); break;
            case 7: work(std::integral_constant<int, 7>(), m, x, out); break;
            case 8: work(std::integral_constant<int, 8>(), m, x, out); break;
        }
    }
}

template <bool again, class W>
void tiles(const W* w, const W* ends, const char* const* next, int64_t count, const Inputs& in, int64_t whole,
           float* out, int64_t stride) {
    each_block(in, out, stride, [&](auto rows, int64_t m, const float* x, float* to) {
        constexpr int M = decltype(rows)::value;
        tiles<W, M, parts_of<M>(again)>(w, ends, m ? nullptr : next, count, x, whole, to, stride);
    });
}

constexpr int64_t MANY = 32;       // inputs from which weights are widened once for all of them
constexpr int64_t WIDE = 1 << 16;  // floats widened at a time: half of a small second cache

// What will be read next, or null: asked for when the last rows before it are at hand.
struct Then {
    const char* (*ask)(void*) = nullptr;
    void* data = nullptr;
    Then() = default;
    template <class F>
    explicit Then(F& f) : ask([](void* data) -> const char* { return (*static_cast<F*>(data))(); }), data(&f) {}
    const char* operator()() const { return ask ? ask(data) : nullptr; }
};

inline const char* row_of(const Matrix& a, int64_t row) { return static_cast<const char*>(a.data) + row * a.stride; }

// Rows [from, to) of a matrix, or those that `ids` name, eight by eight: `work` gets where the eight begin, how many they
// are (behind the last one comes the same again), their addresses, and those of the next eight.
template <class F>
void eights(const Matrix& a, int64_t from, int64_t to, const int64_t* ids, const Then& then, F work) {
    auto row = [&](int64_t r) { return row_of(a, ids ? std::max<int64_t>(0, ids[r]) : r); };
    for (int64_t r = from; r < to; r += 8) {
        const int64_t count = std::min<int64_t>(8, to - r);
        const char *rows[8], *next[9], *behind = r + 16 > to ? then() : nullptr;
        for (int64_t i = 0; i < 8; ++i) {
            rows[i] = row(r + std::min(i, count - 1));
            next[i] = r + i + 8 < to ? row(r + i + 8) : behind ? behind + i * a.stride : rows[i];
        }
        next[8] = next[7];
        work(r, count, rows, next);
    }
}

// Those rows times all inputs, to out[m * stride + (row - from)].
template <class W>
void multiply(const Matrix& a, int64_t from, int64_t to, const int64_t* ids, const Inputs& in, float* out,
              int64_t stride, const Then& then) {
    const bool many = in.rows >= MANY;
    const int64_t wide = padded(a.cols), whole = a.cols / 32 * 32;
    const int64_t room = many ? std::max<int64_t>(8, WIDE / wide / 8 * 8) : 8;
    float* widened = many ? Scratch::at_least(scratch.wide, room * wide) : nullptr;
    std::vector<WeightsF32> views;
    auto widen = [](const W& w, int64_t c, float* to) {
        for (int part = 0; part < PARTS; ++part, to += LANES) store(to, w.low(c, part)), store(to + 16, w.high(c, part));
    };
    eights(a, from, to, ids, then, [&](int64_t r, int64_t count, const char* const* rows, const char* const* next) {
        W w[8];
        for (int i = 0; i < 8; ++i) w[i] = W(rows[i]);
        Ends<W> memory;
        const W* ends = memory.of(a, w, whole);
        if (!many) {
            tiles<false>(w, ends, next, count, in, whole, out + (r - from), stride);
            return;
        }
        for (int i = 0; i < 8; ++i) {
            float* line = widened + views.size() * wide;
            for (int64_t c = 0; c < whole; c += 32) {
                __builtin_prefetch(next[i] + c * sizeof(typename W::Element), 0, 2);
                widen(w[i], c, line + c);
            }
            if (ends) widen(ends[i], 0, line + whole);
            views.emplace_back(line);
        }
        if (static_cast<int64_t>(views.size()) < room && r + 8 < to) return;
        const int64_t start = r + 8 - static_cast<int64_t>(views.size());
        tiles<true, WeightsF32>(views.data(), nullptr, nullptr, r + count - start, in, (a.cols + 31) / 32 * 32,
                          out + (start - from), stride);
        views.clear();
    });
}

void multiply_bytes(const Matrix& a, int64_t from, int64_t to, const int64_t* ids, const Inputs& in, float* out,
                    int64_t stride, const Then& then) {
    const Blocks blocks(a.cols);
    const int64_t apart = in.stride * sizeof(float);
    eights(a, from, to, ids, then, [&](int64_t r, int64_t count, const char* const* rows, const char* const* next) {
        each_block(in, out + (r - from), stride, [&](auto size, int64_t m, const float* x, float* to) {
            constexpr int M = decltype(size)::value, T = parts_of<2 * M>(false), R = ROWS<M, T>;  // with room for two rows
            for (int64_t i = 0; i < count; i += R)
                tile<R, M, T>(rows + i, m ? nullptr : next + i, reinterpret_cast<const char*>(x), apart, blocks, to + i, stride, count - i);
        });
    });
}

// Tiles that only reach into [from, to) are made as a whole. No row of these matrices is asked for by its number.
void multiply_groups(const Matrix& a, int64_t from, int64_t to, const Inputs& in, float* out, int64_t stride,
                     const Then& then) {
    const Groups groups(a.cols);
    const int64_t apart = in.stride * sizeof(float);
    for (int64_t r = from / 16 * 16; r < to; r += 16) {
        const char* next = r + 16 < to ? row_of(a, r + 16) : then();
        const int64_t first = std::max(from, r), last = std::min(to, r + 16);
        each_block(in, out + (first - from), stride, [&](auto size, int64_t m, const float* x, float* into) {
            constexpr int M = decltype(size)::value;
            float got[M * 16];
            constexpr int T = 3 * M * PARTS <= 2 * SUMS ? PARTS : 1;  // with AVX2 both halves for up to four rows
            tile<M, T>(row_of(a, r), m ? nullptr : next, reinterpret_cast<const char*>(x), apart, groups, got);
            for (int i = 0; i < M; ++i) std::copy(got + i * 16 + (first - r), got + i * 16 + (last - r), into + i * stride);
        });
    }
}

void multiply(const Matrix& a, int64_t from, int64_t to, const int64_t* ids, const Inputs& in, float* out,
              int64_t stride, const Then& then) {
    if (a.format == F32) multiply<WeightsF32>(a, from, to, ids, in, out, stride, then);
    else if (a.format == BF16) multiply<WeightsBF16>(a, from, to, ids, in, out, stride, then);
    else if (a.format == INT8) multiply_bytes(a, from, to, ids, in, out, stride, then);
    else multiply_groups(a, from, to, in, out, stride, then);
    if (a.bias)
        for (int64_t m = 0; m < in.rows; ++m)
            for (int64_t r = from; r < to; ++r) out[m * stride + r - from] += a.bias[ids ? std::max<int64_t>(0, ids[r]) : r];
}

// ------------------------------------------------------------------------------------------------ norms

// Sums in sixteen lanes, in float32, whatever the machine.
void normalise(const Norm& n, const float* x, float* y) {
    const int64_t cols = n.cols;
    auto total = [&](float centre, bool squared) {
        Sum acc = {};
        auto add = [&](const float* x) {
            for (int part = 0; part < PARTS; ++part) {
                const f32s d = load(x + part * LANES) - splat(centre);
                acc.part[part] += squared ? d * d : d;
            }
        };
        int64_t c = 0;
        for (; c + 16 <= cols; c += 16) add(x + c);
        if (c < cols) {
            float ends[16];
            std::fill(std::copy(x + c, x + cols, ends), ends + 16, centre);
            add(ends);
        }
        return sum(acc);
    };
    const float mean = n.kind == LAYER ? total(0.0f, false) / cols : 0.0f;
    const float inverse = 1.0f / std::sqrt(total(mean, true) / cols + static_cast<float>(n.eps));
    for (int64_t c = 0; c < cols; ++c) {
        const float z = (x[c] - mean) * inverse;
        y[c] = (n.weight ? z * n.weight[c] : z) + (n.bias ? n.bias[c] : 0.0f);
    }
}

// ------------------------------------------------------------------------------------------------ one call

struct Run {
    const Model& model;
    const Call& call;
    Team& team;
    std::vector<float*> registers;
    float* packed;           // room for the inputs of any matrix

    float* row(int64_t reg, int64_t m) const { return registers[reg] + m * model.widths[reg]; }
};

struct Piece {
    int64_t from, to;
};

// Work is taken in pieces as threads come free, smaller ones towards the end: the machine's cores are not always equally
// ours. A piece that begins at `total` is none.
Piece take(Team& team, size_t stage, int64_t total, int64_t grain) {
    int64_t from = team.taken[stage].load(std::memory_order_relaxed), to;
    do to = std::min(total, from + std::max(grain, (total - from) / (2 * team.threads) / grain * grain));
    while (from < total && !team.taken[stage].compare_exchange_weak(from, to, std::memory_order_relaxed));
    return {std::min(from, total), to};
}

// `work` may ask where its next piece begins (`total`: nowhere), which is then taken: best as late as it can use that.
template <class F>
void shared_out(Team& team, size_t stage, int64_t total, int64_t grain, F work, const Piece* first = nullptr) {
    for (Piece now = first ? *first : take(team, stage, total, grain); now.from < total;) {
        Piece next{-1, -1};
        auto ask = [&] {
            if (next.from < 0) next = take(team, stage, total, grain);
            return next.from;
        };
        work(now.from, now.to, ask);
        ask();
        now = next;
    }
}

// Inputs of matrices, normalised on the way: in each thread's own memory, or, where there are many, in that of all.
Inputs prepared(Team& team, size_t stage, const Norm& norm, const Matrix& a, const float* x, int64_t stride,
                int64_t rows, int64_t block, float* shared) {
    const bool share = rows >= MANY && team.threads > 1;
    const int64_t size = packed_size(a);
    const Inputs in{share ? shared : Scratch::at_least(scratch.packed, rows * size), rows, block, size};
    float* line = Scratch::at_least(scratch.line, a.cols);
    auto pack_rows = [&](int64_t from, int64_t to, auto&&) {
        for (int64_t m = from; m < to; ++m) {
            const float* row = x + m * stride;
            if (norm.kind != NO_NORM) normalise(norm, row, line), row = line;
            pack(in, m, row, a.cols, a.format);
        }
    };
    if (!share) {
        pack_rows(0, rows, 0);
        return in;
    }
    shared_out(team, team.stages + stage, rows, 4, pack_rows);
    team.barrier.wait(team.threads);
    return in;
}

// How many inputs are multiplied at once.
inline int64_t block_of(const Matrix& a, int64_t rows) {
    if (a.format == INT4) return 8;
    if (rows >= MANY) return 6;
    if (SUMS >= 24) return 8;
    const int64_t blocks = (rows + 5) / 6;
    return (rows + blocks - 1) / blocks;
}

// The rows of an op's matrices, counted through: side by side, or those of the first where two are gated.
struct Rows {
    const Op& op;
    int64_t total = 0;
    explicit Rows(const Op& op) : op(op) {
        for (int64_t i = 0; i < op.count; ++i) total += op.matrix[i].rows;
        if (op.into == GATE) total = op.matrix[0].rows;
    }
    const char* at(int64_t row) const {
        for (int64_t i = 0; i < op.count; row -= op.matrix[i++].rows)
            if (row < op.matrix[i].rows) return row_of(op.matrix[i], row);
        return nullptr;
    }
};

// Rows of a matrix that are worth a piece of work with so many rows of inputs.
inline int64_t grain_of(const Matrix& a, int64_t rows) { return rows >= MANY ? 32 : a.format == INT4 ? 16 : 8; }
constexpr int64_t AHEAD = 1 << 16;  // bytes that are fetched for the stage after the next barrier

void linear(Run& run, const Op& op, size_t stage, const Piece& first) {
    const int64_t rows = run.call.rows, width = run.model.widths[op.dst];
    const Inputs in = prepared(run.team, stage, op.norm, op.matrix[0], run.registers[op.src], run.model.widths[op.src],
                               rows, block_of(op.matrix[0], rows), run.packed);
    const Rows all(op);
    float* out = run.registers[op.dst];
    auto work = [&](int64_t from, int64_t to, auto& next) {
        auto at_next = [&] { return all.at(next()); };
        const Then then(at_next);
        if (op.into == ADD) {  // through this thread's memory: the target holds what is added to
            const int64_t n = to - from;
            float* got = Scratch::at_least(scratch.sums, rows * n);
            multiply(op.matrix[0], from, to, nullptr, in, got, n, then);
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t r = 0; r < n; ++r)
                    out[m * width + from + r] += static_cast<float>(op.multiplier) * got[m * n + r];
            return;
        }
        if (op.into == GATE) {
            const Matrix &gate = op.matrix[0], &up = op.matrix[1];
            auto at_up = [&] { return row_of(up, from); };
            multiply(gate, from, to, nullptr, in, out + from, width, Then(at_up));
            multiply(up, from, to, nullptr, in, out + all.total + from, width, then);
        } else {
            int64_t start = 0;
            for (int64_t i = 0; i < op.count; start += op.matrix[i++].rows) {
                const int64_t lo = std::max(from, start), hi = std::min(to, start + op.matrix[i].rows);
                if (lo >= hi) continue;
                auto at_rest = [&] { return all.at(hi); };
                multiply(op.matrix[i], lo - start, hi - start, nullptr, in, out + lo, width, hi < to ? Then(at_rest) : then);
            }
        }
        if (op.into == STORE) return;
        auto lanes = [&](const float* x, const float* up) {
            const f32s v = activated(op.activation, load(x));
            return op.into == GATE ? v * load(up) : v;
        };
        for (int64_t m = 0; m < rows; ++m) {
            float* y = out + m * width + from;
            int64_t n = to - from;
            for (; n >= LANES; n -= LANES, y += LANES) store(y, lanes(y, y + all.total));
            if (n == 0) continue;
            float x[LANES] = {}, up[LANES] = {};
            std::copy(y, y + n, x);
            if (op.into == GATE) std::copy(y + all.total, y + all.total + n, up);
            store(x, lanes(x, up));
            std::copy(x, x + n, y);
        }
    };
    shared_out(run.team, stage, all.total, grain_of(op.matrix[0], rows), work, &first);
}

void norm(Run& run, const Op& op, size_t stage) {
    shared_out(run.team, stage, run.call.rows, 1, [&](int64_t from, int64_t to, auto&&) {
        float* line = Scratch::at_least(scratch.line, op.norm.cols);
        for (int64_t m = from; m < to; ++m) {
            normalise(op.norm, run.row(op.src, m) + op.first, line);
            float* y = run.row(op.dst, m) + (op.into == ADD ? 0 : op.first);
            for (int64_t c = 0; c < op.norm.cols; ++c)
                y[c] = op.into == ADD ? y[c] + static_cast<float>(op.multiplier) * line[c] : line[c];
        }
    });
}

// The cache of one layer that an op works on: that of the text, or that of the encoder's output. Keys of sixteen slots
// lie side by side, so that sixteen scores are computed at once.
struct Slots {
    void *keys, *values;
    int64_t capacity, heads, dim;
    Slots(const Call& call, const Op& op, int64_t layer)
        : keys(op.memory ? call.memory_keys[layer] : call.keys[layer]),
          values(op.memory ? call.memory_values[layer] : call.values[layer]),
          capacity(op.memory ? call.memory_capacity : call.capacity), heads(op.kv_heads), dim(op.head_dim) {}
    int64_t key_at(int64_t b, int64_t head, int64_t slot, int64_t d) const {
        return (((b * heads + head) * (capacity / 16) + slot / 16) * dim + d) * 16 + slot % 16;
    }
    int64_t value_at(int64_t b, int64_t head, int64_t slot) const { return ((b * heads + head) * capacity + slot) * dim; }
};

void turn(const Op& op, const Rotation& table, int64_t position, float* x) {
    const int64_t half = op.rotated / 2;
    const float *cosines = table.cosines + position * half, *sines = table.sines + position * half;
    for (int64_t i = 0; i < half; ++i) {
        float& a = x[op.interleaved ? 2 * i : i];
        float& b = x[op.interleaved ? 2 * i + 1 : half + i];
        const float turned = a * cosines[i] - b * sines[i];
        b = b * cosines[i] + a * sines[i];
        a = turned;
    }
}

// Norms and turns the heads of queries and keys in place, and puts keys and values into the cache. `heads` may be 0: a
// skipped block needs keys and values only.
void rotate(Run& run, const Op& op, size_t stage, int64_t layer) {
    const Call& call = run.call;
    const Slots cache(call, op, layer);
    const int64_t all = op.heads + 2 * op.kv_heads;
    shared_out(run.team, stage, call.rows * all, 4, [&](int64_t from, int64_t to, auto&&) {
        for (int64_t unit = from; unit < to; ++unit) {
            const int64_t m = unit / all, head = unit % all, slot = call.slot[m], b = call.batch[m];
            float* x = run.row(op.src, m) + head * op.head_dim;
            const bool is_value = head >= op.heads + op.kv_heads, is_key = !is_value && head >= op.heads;
            if (op.clip != 0) {
                const float most = static_cast<float>(op.clip);
                for (int64_t d = 0; d < op.head_dim; ++d) x[d] = x[d] < -most ? -most : x[d] > most ? most : x[d];
            }
            if (!is_value) {
                Norm n = is_key ? op.key_norm : op.norm;
                if (op.headwise) n.weight += (is_key ? head - op.heads : head) * op.head_dim;
                if (n.kind != NO_NORM) {
                    float* line = Scratch::at_least(scratch.line, n.cols);
                    normalise(n, x, line);
                    std::copy(line, line + n.cols, x);
                }
                if (op.rotation >= 0) turn(op, call.rotations[op.rotation], call.position[m], x);
            }
            if (is_key) {
                for (int64_t d = 0; d < op.head_dim; ++d) {
                    const int64_t at = cache.key_at(b, head - op.heads, slot, d);
                    if (run.model.kv_format == F32) static_cast<float*>(cache.keys)[at] = x[d];
                    else static_cast<uint16_t*>(cache.keys)[at] = to_bf16(x[d]);
                }
            } else if (is_value) {
                const int64_t at = cache.value_at(b, head - op.heads - op.kv_heads, slot);
                for (int64_t d = 0; d < op.head_dim; ++d)
                    if (run.model.kv_format == F32) static_cast<float*>(cache.values)[at + d] = x[d];
                    else static_cast<uint16_t*>(cache.values)[at + d] = to_bf16(x[d]);
            }
        }
    });
}

// G heads of one token that share keys and values attend to its row's slots up to its own, or to all of the encoder's
// output. What a head computes does not depend on G.
template <class E, int G>
void attend_heads(Run& run, const Op& op, const Slots& cache, int64_t m, int64_t head) {
    const Call& call = run.call;
    const int64_t slot = call.slot[m], b = call.batch[m], dim = op.head_dim, kv = head / (op.heads / op.kv_heads);
    const int64_t first = op.window ? std::max<int64_t>(0, slot - op.window + 1) : 0;
    const int64_t begin = first / 16 * 16, end = op.memory ? call.memory_lengths[b] : slot + 1;
    const float* q = run.row(op.src, m) + head * dim;
    const int64_t apart = (end - begin + 31) / 16 * 16;
    float* p = Scratch::at_least(scratch.line, G * apart);
    const E* keys = static_cast<const E*>(cache.keys) + cache.key_at(b, kv, 0, 0);
    i32s lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = i;
    f32s best[G];
    for (int g = 0; g < G; ++g) best[g] = splat(-INFINITY);
    for (int64_t t = begin; t < end; t += LANES) {
        const E* block = keys + t / 16 * 16 * dim + t % 16;
        f32s even[G], odd[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) even[g] = odd[g] = splat(0.0f);
        int64_t d = 0;
        for (; d + 2 <= dim; d += 2) {
            const f32s one = widened(block + d * 16), two = widened(block + d * 16 + 16);
            if (t % 16 == 0) __builtin_prefetch(block + (2 * dim + d) * 16);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                even[g] += splat(q[g * dim + d]) * one;
                odd[g] += splat(q[g * dim + d + 1]) * two;
            }
        }
        for (int g = 0; g < G; ++g) {
            if (d < dim) even[g] += splat(q[g * dim + d]) * widened(block + d * 16);
            f32s score = (even[g] + odd[g]) * splat(static_cast<float>(op.scale));
            if (op.cap != 0) score = capped(score, static_cast<float>(op.cap));
            if (op.biased) {
                const float* bias = call.distances + (head + g) * call.reach;
                for (int64_t i = 0; i < LANES && t + i <= slot; ++i) score[i] += bias[slot - t - i];
            }
            const i32s at = lanes + static_cast<int32_t>(t);
            const i32s seen = (at >= static_cast<int32_t>(first)) & (at < static_cast<int32_t>(end));
            score = choose(seen, score, splat(-INFINITY));
            store(p + g * apart + (t - begin), score);
            best[g] = choose(score > best[g], score, best[g]);
        }
    }
    float inverse[G];
    for (int g = 0; g < G; ++g) {
        float most = best[g][0];
        for (int i = 1; i < LANES; ++i) most = std::max(most, best[g][i]);
        if (op.sinks) most = std::max(most, op.sinks[head + g]);
        Sum totals = {};
        for (int64_t t = 0; t < end - begin; t += LANES) {
            const f32s e = exponential(load(p + g * apart + t) - splat(most));
            store(p + g * apart + t, e);
            totals.part[t / LANES % PARTS] += e;
        }
        float total = sum(totals);
        if (op.sinks) total += std::exp(op.sinks[head + g] - most);
        inverse[g] = 1.0f / total;
    }
    float* y = run.row(op.dst, m) + head * dim;
    const E* values = static_cast<const E*>(cache.values) + cache.value_at(b, kv, 0);
    auto mix = [&](int64_t d, auto vectors) __attribute__((always_inline)) {
        constexpr int V = decltype(vectors)::value;
        f32s acc[G][V];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) acc[g][i] = splat(0.0f);
        for (int64_t t = first; t < end; ++t) {
            const E* from = values + t * dim + d;
            __builtin_prefetch(from + 16 * dim);
            f32s v[V];
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) v[i] = widened(from + LANES * i);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) acc[g][i] += splat(p[g * apart + t - begin]) * v[i];
        }
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < V; ++i) store(y + g * dim + d + LANES * i, acc[g][i] * splat(inverse[g]));
    };
    int64_t d = 0;
    constexpr int WIDTH = G * 4 < SUMS ? 4 : 2;
    for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) mix(d, std::integral_constant<int, WIDTH>());
    for (; d + LANES <= dim; d += LANES) mix(d, std::integral_constant<int, 1>());
    for (; d < dim; ++d)
        for (int g = 0; g < G; ++g) {
            float acc = 0;
            for (int64_t t = first; t < end; ++t) acc += p[g * apart + t - begin] * widened_one(values[t * dim + d]);
            y[g * dim + d] = acc * inverse[g];
        }
}

template <class E>
void attend_all(Run& run, const Op& op, size_t stage, const Slots& cache) {
    const int64_t group = op.heads / op.kv_heads;
    const int64_t size = group % 4 == 0 ? 4 : group % 3 == 0 ? 3 : group % 2 == 0 ? 2 : 1, units = op.heads / size;
    shared_out(run.team, stage, run.call.rows * units, 1, [&](int64_t from, int64_t to, auto&&) {
        for (int64_t unit = from; unit < to; ++unit) {
            const int64_t m = unit / units, head = unit % units * size;
            switch (size) {
                case 1: attend_heads<E, 1>(run, op, cache, m, head); break;
                case 2: attend_heads<E, 2>(run, op, cache, m, head); break;
                case 3: attend_heads<E, 3>(run, op, cache, m, head); break;
                case 4: attend_heads<E, 4>(run, op, cache, m, head); break;
            }
        }
    });
}

void attend(Run& run, const Op& op, size_t stage, int64_t layer) {
    const Slots cache(run.call, op, layer);
    if (run.model.kv_format == F32) attend_all<float>(run, op, stage, cache);
    else attend_all<uint16_t>(run, op, stage, cache);
}

void programs(void* argument, int64_t) {
    Run& run = *static_cast<Run*>(argument);
    const Model& model = run.model;
    const int64_t begin = model.program[run.call.first], end = model.program[run.call.last];
    auto next_linear = [&](int64_t at) {
        while (at < end && model.ops[at].kind != LINEAR) ++at;
        return at;
    };
    auto first_piece = [&](int64_t at) {
        return at < end ? take(run.team, at - begin, Rows(model.ops[at]).total, grain_of(model.ops[at].matrix[0], run.call.rows)) : Piece{};
    };
    int64_t program = run.call.first, linear_at = next_linear(begin);
    Piece piece = first_piece(linear_at);
    for (int64_t at = begin; at < end; ++at) {
        while (at == model.program[program + 1]) ++program;
        const Op& op = model.ops[at];
        const size_t stage = at - begin;
        const int64_t layer = run.call.layer + program - run.call.first;
        switch (op.kind) {
            case LINEAR: linear(run, op, stage, piece); break;
            case NORM: norm(run, op, stage); break;
            case ROTATE: rotate(run, op, stage, layer); break;
            case ATTEND: attend(run, op, stage, layer); break;
        }
        if (at == linear_at && (linear_at = next_linear(at + 1)) < end) {
            piece = first_piece(linear_at);
            const Rows rows(model.ops[linear_at]);
            if (piece.from < rows.total) {
                ahead.at = rows.at(piece.from);
                ahead.end = ahead.at + std::min(AHEAD, (piece.to - piece.from) * model.ops[linear_at].matrix[0].stride);
            }
        }
        if (run.team.threads > 1) run.team.barrier.wait(run.team.threads);
    }
    ahead = {};
}

// ------------------------------------------------------------------------------------------------ readouts

constexpr int64_t CHUNK = 128;  // logits that are looked through at once, so that no sum depends on the threads

// What is known of the logits of one state and one chunk.
struct Found {
    float best, second, total;  // the sum of e^(logit - best)
};

// Scales and bends n logits in place, and looks for the best of them; those of no row of the head become -inf.
Found look(const Readout& r, const int64_t* ids, float* z, int64_t n) {
    f32s best = splat(-INFINITY), second = best;
    auto piece = [&](int64_t i) {
        if (!ids && i + LANES <= n) return load(z + i);
        float line[LANES];
        for (int64_t k = 0; k < LANES; ++k) line[k] = i + k < n && !(ids && ids[i + k] < 0) ? z[i + k] : -INFINITY;
        return load(line);
    };
    for (int64_t i = 0; i < n; i += LANES) {
        f32s v = piece(i);
        if (r.factor != 1) v = v * splat(static_cast<float>(r.factor));
        if (r.cap != 0) v = choose(v > splat(-INFINITY), capped(v, static_cast<float>(r.cap)), v);
        second = choose(v > best, best, choose(v > second, v, second));
        best = choose(v > best, v, best);
        if (i + LANES <= n) store(z + i, v);
        else std::memcpy(z + i, &v, (n - i) * sizeof(float));
    }
    Found found{best[0], second[0], 0};
    for (int k = 1; k < LANES; ++k) {
        found.second = std::max({found.second, second[k], std::min(found.best, best[k])});
        found.best = std::max(found.best, best[k]);
    }
    const float base = found.best == -INFINITY ? 0.0f : found.best;
    Sum totals = {};
    for (int64_t i = 0; i < n; i += LANES) {
        const f32s v = piece(i);
        totals.part[i / LANES % PARTS] += choose(v == v, exponential(v - splat(base)), v);
    }
    found.total = sum(totals);
    return found;
}

// The two best of K logits, the lowest tokens of equal ones, and the logarithm of the sum of all exponentials.
void judge(const Readout& r, int64_t m, const float* z, const Found* found) {
    const int64_t chunks = (r.count + CHUNK - 1) / CHUNK, *ids = r.ids ? r.ids + m * r.ids_step : nullptr;
    float best = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < chunks; ++i) {
        second = std::max({second, found[i].second, std::min(best, found[i].best)});
        best = std::max(best, found[i].best);
    }
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i)
        total += found[i].total * (found[i].best == -INFINITY ? 1.0 : std::exp(static_cast<double>(found[i].best) - best));
    auto lowest = [&](float value, int64_t other) {  // -1: there is none
        int64_t token = INT64_MAX;
        for (int64_t i = 0; i < r.count; ++i) {
            if (i % CHUNK == 0 && !(found[i / CHUNK].best >= value)) {
                i += CHUNK - 1;
                continue;
            }
            const int64_t id = ids ? ids[i] : i;
            if (z[i] == value && id >= 0 && id < token && id != other) token = id;
        }
        return token == INT64_MAX ? -1 : token;
    };
    r.best[2 * m] = best;
    r.best[2 * m + 1] = second;
    r.tokens[2 * m] = lowest(best, -1);
    r.tokens[2 * m + 1] = lowest(second, r.tokens[2 * m]);
    r.normaliser[m] = static_cast<float>(best + std::log(total));
}

// What the threads of one readout share.
struct Reading {
    const Readout& call;
    Team& team;
    float *inputs, *between, *logits, *packed;
    Found* found;
    int64_t chunks() const { return (call.count + CHUNK - 1) / CHUNK; }
};

void read(void* argument, int64_t) {
    const Reading& reading = *static_cast<Reading*>(argument);
    const Readout& r = reading.call;
    Team& team = reading.team;
    const float* x = r.hidden;
    float* between = reading.between;
    size_t stage = 0;
    for (int64_t i = 0; i < r.lenses; ++i, ++stage) {
        const Matrix& a = r.lens[i];
        const Inputs in = prepared(team, stage, Norm{}, a, x, a.cols, r.rows, block_of(a, r.rows), reading.packed);
        shared_out(team, stage, a.rows, grain_of(a, r.rows), [&](int64_t from, int64_t to, auto&&) {
            multiply(a, from, to, nullptr, in, between + from, a.rows, Then());
        });
        team.barrier.wait(team.threads);
        x = between;
        between += r.rows * a.rows;
    }
    const int64_t width = r.width;
    shared_out(team, stage++, r.rows, 1, [&](int64_t from, int64_t to, auto&&) {
        for (int64_t m = from; m < to; ++m) {
            float* y = reading.inputs + m * width;
            for (int64_t c = 0; c < width; ++c) y[c] = r.hidden[m * width + c] + (r.lenses ? x[m * width + c] : 0.0f);
            if (r.norm && r.norm->kind != NO_NORM) normalise(*r.norm, y, y);
            for (int64_t c = 0; c < width; ++c) y[c] *= static_cast<float>(r.scale);
        }
    });
    if (!r.head) return;
    team.barrier.wait(team.threads);
    const Matrix& a = *r.head;
    const Inputs in = prepared(team, stage, Norm{}, a, reading.inputs, a.cols, r.rows, r.ids_step ? 1 : block_of(a, r.rows), reading.packed);
    const int64_t chunks = reading.chunks(), groups = r.ids_step ? r.rows : 1;  // states that are read together
    auto first_row = [&](int64_t unit) -> const char* {
        if (unit >= groups * chunks) return nullptr;
        const int64_t i = unit % chunks * CHUNK;
        return row_of(a, r.ids ? std::max<int64_t>(0, r.ids[unit / chunks * r.ids_step + i]) : i);
    };
    shared_out(team, stage, groups * chunks, 1, [&](int64_t first, int64_t last, auto& next) {
        for (int64_t unit = first; unit < last; ++unit) {
            auto at_next = [&] { return first_row(unit + 1 < last ? unit + 1 : next()); };
            const int64_t group = unit / chunks, from = unit % chunks * CHUNK, to = std::min(r.count, from + CHUNK);
            const int64_t begin = r.ids_step ? group : 0, end = r.ids_step ? group + 1 : r.rows;
            const Inputs some{in.packed + begin * in.stride, end - begin, in.block, in.stride};
            float* z = reading.logits + begin * r.count + from;
            multiply(a, from, to, r.ids ? r.ids + group * r.ids_step : nullptr, some, z, r.count,
                     Then(at_next));
            for (int64_t m = begin; m < end; ++m, z += r.count)
                reading.found[m * chunks + from / CHUNK] =
                    look(r, r.ids ? r.ids + m * r.ids_step + from : nullptr, z, to - from);
        }
    });
}

}  // namespace

extern "C" {

int64_t offramp_sizes(int64_t which) {  // so that a mirror that has gone astray is noticed
    const int64_t sizes[] = {sizeof(Matrix), sizeof(Norm), sizeof(Op), sizeof(Model), sizeof(Call),
                             sizeof(Readout), sizeof(Cycles), sizeof(Exit), sizeof(Stretch)};
    return which >= 0 && which < 9 ? sizes[which] : -1;
}

// Run programs [first, last) over M tokens.
void offramp_run(const Model* model, const Call* call) {
    thread_local std::vector<float> memory;
    std::vector<float*> registers{call->hidden};
    int64_t size = 0;
    for (int64_t r = 1; r < model->registers; ++r) size += call->rows * model->widths[r];
    float* next = Scratch::at_least(memory, size);
    for (int64_t r = 1; r < model->registers; ++r) {
        registers.push_back(next);
        next += call->rows * model->widths[r];
    }
    const int64_t begin = model->program[call->first], end = model->program[call->last];
    int64_t widest = 0;
    for (int64_t i = begin; i < end; ++i) widest = std::max(widest, model->ops[i].count ? model->ops[i].matrix[0].cols : 0);
    thread_local std::vector<float> packed;
    Team team(call->threads, end - begin);
    Run run{*model, *call, team, registers, Scratch::at_least(packed, call->rows < MANY ? 0 : call->rows * padded(widest))};
    pool().run(call->threads, programs, &run);
}

// Read states out: what the head reads, logits, and the best of them.
void offramp_readout(const Readout* call) {
    const Readout& r = *call;
    thread_local std::vector<float> inputs, between, logits, packed;
    thread_local std::vector<Found> found;
    Team team(r.threads, r.lenses + 2);
    int64_t lens_rows = 0;
    for (int64_t i = 0; i < r.lenses; ++i) lens_rows += r.lens[i].rows;
    int64_t widest = r.width;
    for (int64_t i = 0; i < r.lenses; ++i) widest = std::max(widest, r.lens[i].cols);
    Reading reading{r, team, r.inputs, Scratch::at_least(between, r.rows * lens_rows), r.logits,
                    Scratch::at_least(packed, r.rows < MANY ? 0 : r.rows * padded(widest)), nullptr};
    if (!r.inputs) reading.inputs = Scratch::at_least(inputs, r.rows * r.width);
    if (r.head) {
        if (!r.logits) reading.logits = Scratch::at_least(logits, r.rows * r.count);
        found.resize(std::max<size_t>(found.size(), r.rows * reading.chunks()));
        reading.found = found.data();
    }
    pool().run(r.threads, read, &reading);
    if (r.head && r.best)
        for (int64_t m = 0; m < r.rows; ++m)
            judge(r, m, reading.logits + m * r.count, reading.found + m * reading.chunks());
}

// How sure a readout of one state is: 0: 1 always; 1: the largest probability; 2: its lead.
static float confidence_of(int64_t kind, const Readout& read) {
    if (kind == 0) return 1.0f;
    const float best = std::exp(read.best[0] - *read.normaliser);
    return kind == 1 ? best : best - std::exp(read.best[1] - *read.normaliser);
}

static bool among(const int64_t* tokens, int64_t count, int64_t token) {
    return std::find(tokens, tokens + count, token) != tokens + count;
}

// A token before the first block.
static void embed(const void* embeddings, int64_t format, int64_t token, int64_t width, float* to) {
    if (format == F32) std::memcpy(to, static_cast<const float*>(embeddings) + token * width, width * sizeof(float));
    else for (int64_t c = 0; c < width; ++c) to[c] = widened_one(static_cast<const uint16_t*>(embeddings)[token * width + c]);
}

// What the drafter's mix reads of a token and of what was read one position before.
static void side_by_side(const Cycles& s, int64_t token, const float* before, int64_t width, float* both) {
    embed(s.embeddings, s.format, token, width, both);
    std::memcpy(both + width, before, width * sizeof(float));
    for (float* x = both; x < both + 2 * width; x += width) {
        double squares = 0;
        for (int64_t c = 0; c < width; ++c) squares += static_cast<double>(x[c]) * x[c];
        const float scale = static_cast<float>(1 / std::sqrt(squares / width + 1e-6));
        for (int64_t c = 0; c < width; ++c) x[c] *= scale;
    }
}

// The same call for the tokens at places `at` and behind.
static Call placed(Call call, int64_t at, int64_t rows) {
    call.batch += at, call.slot += at, call.position += at, call.rows = rows;
    return call;
}

// Draft behind tokens [first, first + count) until a draft is not sure enough, ends the text, or is the last of `most`:
// how many were made, and how many were sure enough. False for one that was chosen by no number.
static bool draft(const Model* model, Cycles& s, int64_t first, int64_t count, int64_t most, float* confidences,
                  int64_t& made, int64_t& left) {
    const int64_t width = model->width;
    for (made = left = 0; made < most; first += count, count = 1) {
        for (int64_t m = 0; m < count; ++m)
            side_by_side(s, s.tokens[first + m], s.before + m * width, width, s.both + m * 2 * width);
        s.mix.rows = count;
        offramp_readout(&s.mix);
        const Call call = placed(s.call, first, count);
        offramp_run(model, &call);
        s.test.hidden = call.hidden + (count - 1) * width;
        offramp_readout(&s.test);
        const int64_t token = s.tokens[first + count] = s.test.tokens[0];
        const float confidence = confidences[made++] = confidence_of(s.confidence, s.test);
        if (!(confidence > s.threshold)) break;
        ++left;
        if (!std::isfinite(*s.test.normaliser)) return false;
        if (among(s.ends, s.ends_count, token)) break;
        std::memcpy(s.before, s.test.inputs, width * sizeof(float));
    }
    return true;
}

struct Stopwatch {           // books the time since it was last asked
    double* seconds;         // by part
    std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();
    void operator()(int part) {
        const auto now = std::chrono::steady_clock::now();
        seconds[part] += std::chrono::duration<double>(now - since).count();
        since = now;
    }
};

// Draft and check, until a token ends the text, was chosen by no number, or is the last that is allowed.
void offramp_cycles(const Model* model, Cycles* cycles) {
    Cycles& s = *cycles;
    const int64_t width = model->width;
    Stopwatch book{s.seconds};
    int64_t first = 0, count = s.count, room = s.room;
    for (s.made = 0; s.made < s.cycles && room > 0;) {
        float *confidences = s.confidences + s.made * s.most, *logprobs = s.logprobs + s.made * (s.most + 1);
        int64_t *note = s.notes + 6 * s.made++, behind = first + count;
        int64_t &left = note[2], &rows = note[3], &stand = note[4], &sound = note[5];
        note[0] = count, rows = stand = sound = 0;
        if (!draft(model, s, first, count, std::min(s.most, room), confidences, note[1], left)) return;
        const bool over = left && (left == room || among(s.ends, s.ends_count, s.tokens[behind + left - 1]));
        rows = left + !over;
        for (int64_t m = 0; m < rows; ++m)
            embed(s.embeddings, s.format, s.tokens[behind - 1 + m], width, s.deep.hidden + m * width);
        const Call deep = placed(s.deep, behind - 1, rows);
        offramp_run(model, &deep);
        book(0);
        s.check.rows = rows;
        offramp_readout(&s.check);
        book(1);
        bool agreed = true;
        for (count = 0; count < rows && agreed; ++count) {
            if (!std::isfinite(s.check.normaliser[count])) return;
            int64_t& token = s.tokens[behind + count];
            const int64_t* choices = s.check.tokens + 2 * count;
            const float* values = s.check.best + 2 * count;
            const bool drafted = count < left;
            const bool second = drafted && s.accept < 1 && token == choices[1] && std::exp(values[1] - values[0]) >= s.accept;
            agreed = drafted && (second || token == choices[0]);
            stand += agreed;
            token = choices[second];
            logprobs[count] = values[second] - s.check.normaliser[count];
        }
        sound = 1, first = behind, room -= count;
        if (among(s.ends, s.ends_count, s.tokens[first + count - 1])) return;
    }
}

// The `count` tokens of the largest logits [rows, vocabulary], best first, of equal ones the lowest first, into [rows,
// count]; all but `skipped` ones. Found by a histogram of the upper bits: a heap or a partition moves far more.
void offramp_rank(const float* logits, int64_t rows, int64_t vocabulary, const int64_t* skip, int64_t skipped,
                  int64_t count, int64_t* tokens) {
    struct Ranked {
        uint32_t key;
        int32_t token;
        bool operator<(const Ranked& other) const { return key != other.key ? key > other.key : token < other.token; }
    };
    thread_local std::vector<uint32_t> keys;
    thread_local std::vector<Ranked> best;
    keys.resize(vocabulary);
    for (int64_t m = 0; m < rows; ++m) {
        std::memcpy(keys.data(), logits + m * vocabulary, vocabulary * sizeof(float));
        for (auto& key : keys)  // ordered as the floats are, and both zeros alike
            key = key == 0x80000000u ? key : key & 0x80000000u ? ~key : key | 0x80000000u;
        for (int64_t i = 0; i < skipped; ++i) keys[skip[i]] = 0;
        int64_t bins[4096] = {}, left = count;
        for (const auto key : keys) ++bins[key >> 20];
        int64_t bin = 4095;
        for (; bin > 0 && bins[bin] < left; --bin) left -= bins[bin];
        const uint32_t least = static_cast<uint32_t>(bin) << 20;
        best.clear();
        for (int64_t v = 0; v < vocabulary; ++v)
            if (keys[v] >= least) best.push_back({keys[v], static_cast<int32_t>(v)});
        std::partial_sort(best.begin(), best.begin() + count, best.end());
        for (int64_t i = 0; i < count; ++i) tokens[m * count + i] = best[i].token;
    }
}

// Keys and values for layers [lo, hi) of tokens that left before them, in one product for neighbours that lack the same.
static void catch_up(const Model* model, Stretch& s, int64_t lo, int64_t hi, int64_t seen) {
    thread_local std::vector<float> states;
    thread_local std::vector<int64_t> due, also, places;
    auto lacking = [&](int64_t layer, std::vector<int64_t>& found) {
        found.clear();
        for (int64_t i = s.filled[layer]; i < seen; ++i)
            if (s.frozen_layer[i] <= layer) found.push_back(i);
    };
    for (int64_t end; lo < hi; lo = end) {
        lacking(lo, due);
        for (end = lo + 1; end < hi; ++end)
            if (lacking(end, also), also != due) break;
        std::fill(s.filled + lo, s.filled + end, seen);
        const int64_t count = due.size(), width = model->width;
        if (!count) continue;
        states.resize(count * width);
        places.assign(3 * count, 0);  // row 0 of the batch, slots, positions
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(states.data() + i * width, s.frozen + due[i] * width, width * sizeof(float));
            places[count + i] = s.frozen_slot[due[i]], places[2 * count + i] = s.frozen_position[due[i]];
        }
        s.fill.first = s.blocks + lo, s.fill.last = s.blocks + end, s.fill.layer = lo, s.fill.rows = count;
        s.fill.hidden = states.data(), s.fill.batch = places.data();
        s.fill.slot = places.data() + count, s.fill.position = places.data() + 2 * count;
        offramp_run(model, &s.fill);
        const int64_t note[] = {s.made, lo, end, count};
        std::copy(note, note + 4, s.fills + 4 * s.fills_count++);
    }
}

// Generate until a token ends the text, was chosen by no number, or is the last that is allowed.
void offramp_stretch(const Model* model, Stretch* stretch) {
    Stretch& s = *stretch;
    const int64_t width = model->width;
    Stopwatch book{s.seconds};
    int64_t token = s.token;
    s.fills_count = 0;
    for (s.made = 0; s.made < s.most; ++s.call.slot, ++s.call.position) {
        embed(s.embeddings, s.format, token, width, s.call.hidden);
        const int64_t at = s.made, seen = s.frozen_count;
        int64_t depth = 0, tests = 0;
        float confidence = NAN;
        const Readout* read = nullptr;
        for (int64_t e = 0; e < s.exits; ++e) {
            Exit& exit = s.exit[e];
            catch_up(model, s, depth, exit.layer, seen);
            book(1);
            s.call.first = s.call.layer = depth, s.call.last = depth = exit.layer;
            offramp_run(model, &s.call);
            book(0);
            read = &exit.test;
            offramp_readout(read);
            book(exit.test.ids ? 3 : 2);
            if (e + 1 == s.exits) break;
            confidence = confidence_of(s.confidence, *read);
            if (confidence > s.thresholds[at * (s.exits - 1) + tests++]) {
                std::memcpy(s.frozen + s.frozen_count * width, s.call.hidden, width * sizeof(float));
                s.frozen_layer[s.frozen_count] = depth;
                s.frozen_slot[s.frozen_count] = *s.call.slot, s.frozen_position[s.frozen_count++] = *s.call.position;
                break;
            }
            if (s.keep && tests == 1 && s.exits > 2) {
                offramp_rank(read->logits, 1, read->count, s.skip, s.skipped, s.keep, s.kept);
                if (read->ids) for (int64_t i = 0; i < s.keep; ++i) s.kept[i] = read->ids[s.kept[i]];
                book(4);
            }
        }
        token = s.tokens[at] = read->tokens[0];
        s.layers[at] = depth, s.tests[at] = tests, s.confidences[at] = confidence, s.normalisers[at] = *read->normaliser;
        ++s.made;
        if (!std::isfinite(*read->normaliser) || among(s.ends, s.ends_count, token)) return;
    }
}

// Bytes read as fast as they come, for comparison: returns their sum so that nobody leaves the reading out.
uint64_t offramp_read(const uint64_t* data, int64_t words, int64_t threads) {
    struct Probe {
        const uint64_t* data;
        int64_t words;
        std::atomic<uint64_t> total{0};
        Team team;
    } probe{data, words, {}, Team(threads, 1)};
    pool().run(
        threads,
        [](void* argument, int64_t) {
            Probe& p = *static_cast<Probe*>(argument);
            shared_out(p.team, 0, p.words, 1 << 15, [&](int64_t from, int64_t to, auto&&) {
                typedef uint64_t u64x8 __attribute__((vector_size(64)));
                u64x8 acc[4] = {};
                int64_t i = from;
                for (; i + 32 <= to; i += 32)
#pragma GCC unroll 4
                    for (int k = 0; k < 4; ++k) {
                        u64x8 v;
                        std::memcpy(&v, p.data + i + 8 * k, 64);
                        acc[k] += v;
                        __builtin_prefetch(p.data + i + 8 * k + 256);
                    }
                uint64_t total = 0;
                for (int k = 0; k < 4; ++k)
                    for (int j = 0; j < 8; ++j) total += acc[k][j];
                for (; i < to; ++i) total += p.data[i];
                p.total += total;
            });
        },
        &probe);
    return probe.total;
}
}
