#pragma once

// All of nearfar, in reading order.

// clang-format off
#include <nearfar/version.hpp>         // the version and the inline namespace named by it
#include <nearfar/tokens.hpp>          // views of sequences
#include <nearfar/context.hpp>         // threads and working memory
#include <nearfar/attention.hpp>       // the concepts, and what attention reads
#include <nearfar/mask.hpp>            // which keys a query sees
#include <nearfar/checks.hpp>          // what every mechanism refuses, in one sentence each
#include <nearfar/online_softmax.hpp>  // the running softmax: maximum, sum, weighted value
#include <nearfar/feature_map.hpp>     // the feature maps of linear attention

#include <nearfar/softmax.hpp>         // exact
#include <nearfar/banded.hpp>          // near field: a window
#include <nearfar/linear.hpp>          // far field: feature maps
#include <nearfar/nystrom.hpp>         // far field: landmarks
#include <nearfar/fmm.hpp>             // both fields, blended by learned weights
#include <nearfar/additive.hpp>        // one global query, one global key
#include <nearfar/multipole.hpp>       // near blocks one by one, far groups pooled

#include <nearfar/merge.hpp>           // attention to some keys and attention to others made one
#include <nearfar/line_format.hpp>     // how mechanisms and their options are written in a line of text
#include <nearfar/any_attention.hpp>   // any of them, chosen by such a line
// clang-format on

// Below these: engine/microkernel.hpp and engine/tiles.hpp, which all share, and a folder for what stands behind each
// mechanism: engine/softmax (also the near field of Banded, Fmm and Multipole), linear, nystrom, additive, multipole.
// detail/ is the ground floor: vectors, exp, transposition, stores, fetching ahead, threads, memory, errors.
