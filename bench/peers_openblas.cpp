#include "mechanisms.hpp"

#include <cblas.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

// What one builds by hand from a fast BLAS: the same algorithms in blocks, each product a call of sgemm, a head's block
// of rows a task, OpenBLAS itself on one thread.
namespace bench {
namespace {

using Block = Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using nearfar::detail::Scratch;

constexpr Index key_block = 512;

enum Transpose { no, yes };

/// C = alpha A B + beta C, row-major, A rows x depth and B depth x cols after transposing.
void multiply(Transpose transpose_a, Transpose transpose_b, Index rows, Index cols, Index depth, float alpha,
              const float* a, Index a_stride, const float* b, Index b_stride, float beta, float* c, Index c_stride) {
  const auto flag = [](Transpose transpose) { return transpose == yes ? CblasTrans : CblasNoTrans; };
  const auto size = [](Index index) { return static_cast<blasint>(index); };
  cblas_sgemm(CblasRowMajor, flag(transpose_a), flag(transpose_b), size(rows), size(cols), size(depth), alpha, a,
              size(a_stride), b, size(b_stride), beta, c, size(c_stride));
}

/// Softmax over the keys that a window shows, by online softmax over key blocks.
void attend(const nearfar::Heads& heads, nearfar::Window window, const nearfar::Inputs<float>& inputs,
            nearfar::Tokens<float> out, nearfar::Context& context) {
  const Index d = heads.dim;
  const Index n = inputs.query.rows();
  const nearfar::Band band(window, n, inputs.key.rows());
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  const Index query_block = window.left < key_block ? 64 : 256;  // the fastest of 64, 128 and 256 on Zen 4, as below
  const Index blocks = (n + query_block - 1) / query_block;
  nearfar::detail::Work work(context);
  work.for_each(heads.query * blocks, [&](Index task, Scratch& scratch) {
    const Index head = task / blocks * d;
    const Index first = task % blocks * query_block;
    const Index rows = std::min(query_block, n - first);
    Eigen::Map<Block> scores(scratch.take<float>(rows * key_block), rows, key_block);
    Eigen::Map<Block> sum(scratch.take<float>(rows * d), rows, d);
    Eigen::ArrayXf max = Eigen::ArrayXf::Constant(rows, -std::numeric_limits<float>::infinity());
    Eigen::ArrayXf weight = Eigen::ArrayXf::Zero(rows);
    sum.setZero();
    const auto any = band.seen_by_any(first, rows);
    const auto all = band.seen_by_all(first, rows);
    for (Index begin = any.first; begin < any.end; begin += key_block) {
      const Index keys = std::min(key_block, any.end - begin);
      multiply(no, yes, rows, keys, d, scale, inputs.query.row(first) + head, inputs.query.stride(),
               inputs.key.row(begin) + head, inputs.key.stride(), 0, scores.data(), key_block);
      const bool masked = begin < all.first || begin + keys > all.end;
      for (Index i = 0; i < rows; ++i) {
        auto row = scores.row(i).head(keys);
        if (masked) {
          const Index from = std::clamp<Index>(band.first(first + i) - begin, 0, keys);
          const Index to = std::clamp<Index>(band.end(first + i) - begin, from, keys);
          row.head(from).setConstant(-std::numeric_limits<float>::infinity());
          row.tail(keys - to).setConstant(-std::numeric_limits<float>::infinity());
          if (from == to) {
            row.setZero();
            continue;
          }
        }
        const float larger = std::max(max(i), row.maxCoeff());
        const float shrink = std::exp(max(i) - larger);
        row = (row - larger).exp();
        weight(i) = weight(i) * shrink + row.sum();
        sum.row(i) *= shrink;
        max(i) = larger;
      }
      multiply(no, no, rows, d, keys, 1, scores.data(), key_block, inputs.value.row(begin) + head,
               inputs.value.stride(), 1, sum.data(), d);
    }
    for (Index i = 0; i < rows; ++i) {
      Eigen::Map<Eigen::ArrayXf>(out.row(first + i) + head, d) = sum.row(i).transpose() / weight(i);
    }
  });
}

void elu_plus_one(nearfar::Tokens<const float> tokens, Index first, Index rows, Index head,
                  Eigen::Map<Block>& features) {
  for (Index i = 0; i < rows; ++i) {
    const Eigen::Map<const Eigen::ArrayXf> x(tokens.row(first + i) + head, features.cols());
    features.row(i) = (x.max(0.0f) + x.min(0.0f).exp()).transpose();
  }
}

/// Linear attention, one elu map, row sums: a state of d x d a head, moved forward chunk by chunk (causal), or summed
/// first and read afterwards.
void attend_linearly(const nearfar::Heads& heads, bool causal, const nearfar::Inputs<float>& inputs,
                     nearfar::Tokens<float> out, nearfar::Context& context) {
  const Index d = heads.dim;
  const Index n = inputs.query.rows();
  const Index chunk = causal ? 64 : 128;
  nearfar::detail::Work work(context);
  work.for_each(heads.query, [&](Index task, Scratch& scratch) {
    const Index head = task * d;
    Eigen::Map<Block> state(scratch.take<float>(d * d), d, d);
    Eigen::Map<Eigen::RowVectorXf> total(scratch.take<float>(d), d);
    Eigen::Map<Block> query(scratch.take<float>(chunk * d), chunk, d);
    Eigen::Map<Block> key(scratch.take<float>(chunk * d), chunk, d);
    Eigen::Map<Block> result(scratch.take<float>(chunk * d), chunk, d);
    Eigen::Map<Block> scores(scratch.take<float>(chunk * chunk), chunk, chunk);
    state.setZero();
    total.setZero();
    const auto absorb = [&](Index first, Index rows) {
      multiply(yes, no, d, d, rows, 1, key.data(), d, inputs.value.row(first) + head, inputs.value.stride(), 1,
               state.data(), d);
      total += key.topRows(rows).matrix().colwise().sum();
    };
    if (!causal) {
      for (Index first = 0; first < n; first += chunk) {
        const Index rows = std::min(chunk, n - first);
        elu_plus_one(inputs.key, first, rows, head, key);
        absorb(first, rows);
      }
    }
    for (Index first = 0; first < n; first += chunk) {
      const Index rows = std::min(chunk, n - first);
      elu_plus_one(inputs.query, first, rows, head, query);
      multiply(no, no, rows, d, d, 1, query.data(), d, state.data(), d, 0, result.data(), d);
      Eigen::ArrayXf weight = (query.topRows(rows).matrix() * total.transpose()).array();
      if (causal) {
        elu_plus_one(inputs.key, first, rows, head, key);
        multiply(no, yes, rows, rows, d, 1, query.data(), d, key.data(), d, 0, scores.data(), chunk);
        for (Index i = 0; i < rows; ++i) {
          scores.row(i).head(rows).tail(rows - i - 1).setZero();
          weight(i) += scores.row(i).head(rows).sum();
        }
        multiply(no, no, rows, d, rows, 1, scores.data(), chunk, inputs.value.row(first) + head, inputs.value.stride(),
                 1, result.data(), d);
        absorb(first, rows);
      }
      for (Index i = 0; i < rows; ++i) {
        Eigen::Map<Eigen::ArrayXf>(out.row(first + i) + head, d) = result.row(i).transpose() / weight(i);
      }
    }
  });
}

}  // namespace

void choose_openblas_kernels(char** arguments) {
#if defined(__AVX512F__)
  const char* const core = "SkylakeX";
#elif defined(__AVX2__)
  const char* const core = "Haswell";
#else
  const char* const core = nullptr;
#endif
  const auto without_them = {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Atom"};
  const bool chosen_badly = std::count(without_them.begin(), without_them.end(), std::string(openblas_get_corename()));
  if (core == nullptr || !chosen_badly || std::getenv("OPENBLAS_CORETYPE") != nullptr) return;
  // It chooses when it is loaded.
  setenv("OPENBLAS_CORETYPE", core, 1);
  execv("/proc/self/exe", arguments);
}

void add_openblas(Suite& suite) {
  suite.note(std::string("OpenBLAS, LibTorch's products too, takes its kernels for ") + openblas_get_corename() +
             "; OPENBLAS_CORETYPE names others.");
  const auto add_peer = [&suite](const char* mechanism, bool causal, Index quick, auto flops, auto attend_with,
                                 auto attention) {
    add<float>(suite, {.family = "peer/openblas",
                       .mechanism = mechanism,
                       .causal = causal,
                       .reach = {.quick = quick, .full = 4 * quick},
                       .flops = flops,
                       .prepare =
                           [=](const auto& inputs, auto out) {
                             return [=](nearfar::Context& context) {
                               openblas_set_num_threads(1);
                               attend_with(inputs, out, context);
                             };
                           },
                       .expected = expected_of(attention)});
  };
  const auto add_window = [&](const char* mechanism, bool causal, nearfar::Window window, Index quick) {
    add_peer(
        mechanism, causal, quick, [=](Index n) { return flops_of_window(standard_heads, window, n); },
        [=](const auto& inputs, auto out, nearfar::Context& context) {
          attend(standard_heads, window, inputs, out, context);
        },
        nearfar::Banded<float>(standard_heads, {.window = window, .causal = causal}));
  };
  for (const bool causal : {false, true}) {
    add_window("softmax", causal, full_window(causal), 4096);
    add_window("banded", causal, banded_window(causal), 16384);
    add_peer(
        "linear", causal, 16384, [=](Index n) { return flops_of_linear(standard_heads, n, 1, causal); },
        [=](const auto& inputs, auto out, nearfar::Context& context) {
          attend_linearly(standard_heads, causal, inputs, out, context);
        },
        nearfar::Linear<float>(standard_heads, {.causal = causal}));
  }
}

}  // namespace bench
