// Products of the native kernels, on any processor they can be compiled for: within rounding of sums in double, and
// each row the same bit for bit whether it comes alone or with others. Prints what it did; exits with 1 if it is not so.

#include "../src/offramp/native/kernels.cpp"

#include <cstdio>
#include <random>

std::mt19937 generator(0);

struct Case {
    Matrix matrix;
    std::vector<char> memory;
    std::vector<double> values;  // [rows, cols], as the matrix means them

    Case(int64_t format, int64_t rows, int64_t cols) : values(rows * cols) {
        std::normal_distribution<float> normal;
        const Blocks blocks(cols);
        const Groups groups(cols);
        const int64_t strides[] = {4 * cols, 2 * cols, blocks.count * blocks.weights(), groups.weights() / 16};
        const int64_t stride = strides[format];
        memory.assign((rows + 15) / 16 * 16 * stride, format == INT8 ? static_cast<char>(128) : 0);  // all zeros
        matrix = {format, rows, cols, stride, memory.data(), nullptr};
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c) {
                char* row = memory.data() + r * stride;
                if (format == INT8) {
                    const int64_t step = c / 64, lane = c % 16, block = step / blocks.steps;
                    const uint16_t scale = to_bf16(0.01f * static_cast<float>(1 + (r + lane + block) % 3));
                    const int whole = static_cast<int>(generator() % 255) - 127;
                    char* at = row + block * blocks.weights();
                    at[step % blocks.steps * 64 + lane * 4 + c % 64 / 16] = static_cast<char>(whole + 128);
                    std::memcpy(at + blocks.steps * 64 + 2 * lane, &scale, 2);
                    turned_back(r, c, cols, whole * static_cast<double>(widened_one(scale)));
                } else if (format == INT4) {
                    const int64_t lane = r % 16, group = c / 32, half = c % 8 / 4;
                    char *tile = memory.data() + (r - lane) * stride, *at = tile + group * Groups::WEIGHTS;
                    const int whole = static_cast<int>(generator() % 16);
                    const int16_t both[] = {static_cast<int16_t>(1000 + 7 * lane + group), static_cast<int16_t>(-8000 + 50 * group)};
                    const float units[] = {1e-5f * (1 + lane % 3), 1.1e-5f};
                    at[c % 32 / 8 * 64 + lane * 4 + c % 4] |= static_cast<char>(whole << 4 * half);
                    for (int i = 0; i < 2; ++i) {
                        std::memcpy(at + 256 + 32 * i + 2 * lane, both + i, 2);
                        std::memcpy(tile + groups.count * Groups::WEIGHTS + 64 * i + 4 * lane, units + i, 4);
                    }
                    values[r * cols + c] = static_cast<double>(units[0]) * both[0] * whole + static_cast<double>(units[1]) * both[1];
                } else {
                    const uint16_t half = to_bf16(normal(generator));
                    const float value = widened_one(half);
                    std::memcpy(row + c * (format == F32 ? 4 : 2), format == F32 ? (const void*)&value : &half, format == F32 ? 4 : 2);
                    values[r * cols + c] = value;
                }
            }
    }

    // Adds what a number in eight bits stands for to all columns of its lane and its Hadamard matrix.
    void turned_back(int64_t row, int64_t c, int64_t cols, double value) {
        const Blocks blocks(cols);
        const int64_t width = blocks.steps * 64, first = c / width * width, own = (c - first) / 16;
        int64_t begin = 0, size = 0;
        for (int64_t left = width / 16; begin + size <= own; left -= size)
            for (begin += size, size = 1; 2 * size <= left;) size *= 2;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t to = first + (begin + i) * 16 + c % 16;
            const double sign = __builtin_popcountll(i & (own - begin)) % 2 ? -1 : 1;
            if (to < cols) values[row * cols + to] += sign * value / std::sqrt(static_cast<double>(size));
        }
    }

    std::vector<float> times(const float* x, int64_t count) const {
        std::vector<float> memory, out(count * matrix.rows);
        const int64_t size = packed_size(matrix);
        const Inputs inputs{Scratch::at_least(memory, count * size), count, block_of(matrix, count), size};
        for (int64_t m = 0; m < count; ++m) pack(inputs, m, x + m * matrix.cols, matrix.cols, matrix.format);
        multiply(matrix, 0, matrix.rows, nullptr, inputs, out.data(), matrix.rows, Then());
        return out;
    }
};

int main() {
    const double allowed[] = {1e-6, 1e-6, 1e-2, 3e-2};  // of the sum of all sizes; for bytes and less inputs are rounded
    double worst[4] = {};
    bool alike = true;
    for (int64_t format : {F32, BF16, INT8, INT4})
        for (int64_t cols : {5, 33, 64, 100, 576, 800, 1700})
            for (int64_t rows : {1, 9, 24})
                for (int64_t count : {1, 2, 3, 5, 7, 8, 31, 40}) {
                    const Case one(format, rows, cols);
                    std::normal_distribution<float> normal;
                    std::vector<float> x(count * cols);
                    for (float& v : x) v = normal(generator);
                    const std::vector<float> together = one.times(x.data(), count);
                    for (int64_t m = 0; m < count; ++m) {
                        const std::vector<float> alone = one.times(&x[m * cols], 1);
                        alike &= std::memcmp(alone.data(), &together[m * rows], rows * sizeof(float)) == 0;
                        for (int64_t r = 0; r < rows; ++r) {
                            double want = 0, sizes = 1e-9;
                            for (int64_t c = 0; c < cols; ++c) {
                                const double product = x[m * cols + c] * one.values[r * cols + c];
                                want += product, sizes += std::fabs(product);
                            }
                            worst[format] = std::max(worst[format], std::fabs(together[m * rows + r] - want) / sizes);
                        }
                    }
                }
    std::printf("%d lanes; off by at most %.2g, %.2g, %.2g, %.2g of the sums of sizes; rows alone %s\n", LANES, worst[0],
                worst[1], worst[2], worst[3], alike ? "the same" : "NOT THE SAME");
    return !alike || worst[0] > allowed[0] || worst[1] > allowed[1] || worst[2] > allowed[2] || worst[3] > allowed[3];
}
