#include <nearfar/nearfar.hpp>

#include <iostream>

int main() {
  const nearfar::Heads heads{.query = 8, .key_value = 8, .dim = 64};
  const nearfar::Multipole<float> attention(heads, {.block = 64, .rank = 4, .causal = true});

  const nearfar::Index tokens = 2000;
  const nearfar::Matrix<float> q = nearfar::Matrix<float>::Random(tokens, heads.query_cols());
  const nearfar::Matrix<float> k = nearfar::Matrix<float>::Random(tokens, heads.key_cols());
  const nearfar::Matrix<float> v = nearfar::Matrix<float>::Random(tokens, heads.value_cols());

  nearfar::Matrix<float> out(tokens, heads.out_cols());
  attention.forward({q, k, v}, out);

  nearfar::Matrix<float> exact(tokens, heads.out_cols());
  nearfar::Softmax<float>(heads, {.causal = true}).forward({q, k, v}, exact);
  std::cout << "relative distance from exact attention: " << (out - exact).norm() / exact.norm() << '\n';
}
