// A prompt, then token after token: what is causal streams, and gives the rows that it would give for the whole
// sequence. The state of most mechanisms stays small however long the stream.

#include <nearfar/nearfar.hpp>

#include <chrono>
#include <cstdio>

int main() {
  using nearfar::Index;
  using Matrix = nearfar::Matrix<float>;
  const nearfar::Heads heads{.query = 4, .key_value = 2, .dim = 32};
  const Index prompt = 1000, tokens = 1200;
  const Matrix q = Matrix::Random(tokens, heads.query_cols());
  const Matrix k = Matrix::Random(tokens, heads.key_cols());
  const Matrix v = Matrix::Random(tokens, heads.value_cols());

  for (const char* line : {"softmax:causal", "banded:left=63,causal", "linear:causal", "fmm:left=63,causal",
                           "additive:causal", "multipole:causal"}) {
    const nearfar::AnyAttention<float> attention(heads, line);
    Matrix out(tokens, heads.out_cols());
    auto state = attention.start(tokens);
    const auto extend = [&](Index first, Index count) {
      attention.extend(state, {q.middleRows(first, count), k.middleRows(first, count), v.middleRows(first, count)},
                       out.middleRows(first, count));
    };
    extend(0, prompt);
    const auto begin = std::chrono::steady_clock::now();
    for (Index i = prompt; i < tokens; ++i) extend(i, 1);
    const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - begin;

    Matrix whole(tokens, heads.out_cols());
    attention.forward({q, k, v}, whole);
    std::printf("%-22s %7.1f microseconds a token, relative distance from the whole sequence %.6f\n", line,
                spent.count() / static_cast<double>(tokens - prompt),
                static_cast<double>((out - whole).norm() / whole.norm()));
  }
}
