#include "mechanisms.hpp"

#include <limits>

// The plain way with Eigen, as one writes it down: for each head Q K^T, softmax, times V, with its n x n matrix.
namespace bench {
namespace {

void attend(const nearfar::Heads& heads, const nearfar::Inputs<float>& inputs, nearfar::Tokens<float> out, bool causal,
            Index head) {
  const Index first = head * heads.dim;
  const auto query = inputs.query.middle_cols(first, heads.dim).matrix();
  const auto key = inputs.key.middle_cols(first, heads.dim).matrix();
  const auto value = inputs.value.middle_cols(first, heads.dim).matrix();
  nearfar::Matrix<float> scores(query.rows(), key.rows());
  scores.noalias() = query * key.transpose();
  const float scale = 1 / std::sqrt(static_cast<float>(heads.dim));
  for (Index i = 0; i < scores.rows(); ++i) {
    if (causal) scores.row(i).tail(scores.cols() - i - 1).setConstant(-std::numeric_limits<float>::infinity());
    auto row = scores.row(i).array();
    row = (scale * (row - row.maxCoeff())).exp();
    row /= row.sum();
  }
  out.middle_cols(first, heads.dim).matrix().noalias() = scores * value;
}

}  // namespace

void add_eigen(Suite& suite) {
  for (const bool causal : {false, true}) {
    add<float>(suite, {.family = "peer/eigen",
                       .mechanism = "softmax",
                       .causal = causal,
                       .reach = {.quick = 4096, .full = 8192},
                       .flops = [=](Index n) { return flops_of_window(standard_heads, full_window(causal), n); },
                       .prepare =
                           [=](const auto& inputs, auto out) {
                             return [=](nearfar::Context& context) {
                               nearfar::detail::Work work(context);
                               work.for_each(standard_heads.query, [&](Index head, auto&) {
                                 attend(standard_heads, inputs, out, causal, head);
                               });
                             };
                           },
                       .expected = expected_of(nearfar::Softmax<float>(standard_heads, {.causal = causal}))});
  }
}

}  // namespace bench
