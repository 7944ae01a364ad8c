// Random calls of the fused operations through the C interface, and their results against the formulas in long double.
// The tests and the fuzz target share them. Each function makes one call with all that belongs to it; it returns
// whether everything that was answered is right, and prints what is not.
#pragma once

#include <functional>
#include <string>

#include "arrays.h"
#include "heedful_ops/cross_entropy.h"
#include "heedful_ops/gated.h"
#include "heedful_ops/layer_norm_gelu.h"
#include "heedful_ops/parametric_swish.h"
#include "heedful_ops/rms_norm.h"
#include "heedful_ops/rope.h"
#include "heedful_ops/row_products.h"
#include "heedful_ops/softmax.h"

namespace reference {

struct Operations {
    Source &source;
    int32_t dtype, wide;
    const heedful_threads *threads;
    // What becomes of an array before a call sees it: nothing, or damage, and then no result counts.
    std::function<void(heedful_array &)> spoil;

    Operations(Source &source, int32_t dtype, const heedful_threads *threads)
        : source(source), dtype(dtype), wide(computed_dtype(dtype)), threads(threads) {}

    static bool complain(const std::string &what) {
        std::fprintf(stderr, "%s\n", what.c_str());
        return false;
    }

    // Of a call that was answered with this status: whether its results are to be looked at.
    bool answered(heedful_status status, const char *name, bool &good) const {
        if (spoil) return false;
        if (status != HEEDFUL_OK) good = complain(std::string(name) + ": " + heedful_error_message());
        return status == HEEDFUL_OK;
    }
    heedful_array seen(const Array &array) const {
        heedful_array view = array.seen();
        if (spoil) spoil(view);
        return view;
    }

    bool near(const Array &found, const Sizes &index, Running wanted, const char *name) const {
        const double computed = wide == HEEDFUL_FLOAT64 ? 0x1p-53 : 0x1p-24;
        // A factor that is flushed to 0 has others beside it.
        const double least = std::max(SMALLEST[found.dtype], 0x1p8 * SMALLEST[wide]);
        const Wide value = found[index],
                   bound = 8 * (ROUNDOFF[found.dtype] * std::fabs(wanted.value) + computed * wanted.error) + least;
        if (std::fabs(value - wanted.value) <= bound) return true;
        std::string text = std::string(name) + " of dtype " + std::to_string(dtype) + " at";
        for (const int64_t i : index) text += " " + std::to_string(i);
        char numbers[128];
        std::snprintf(numbers, sizeof numbers, " is %.9Lg, not %.9Lg within %.3Lg", value, wanted.value, bound);
        return complain(text + numbers);
    }

    Sizes shape(int64_t least = 0) const {
        Sizes size;
        for (int64_t dims = source.pick(least, 4); dims > 0; --dims)
            size.push_back(source.once_in(12) ? 0 : source.once_in(6) ? source.pick(1, 700) : source.pick(1, 9));
        int64_t count = 1;
        for (int64_t &n : size) {
            while (n > 1 && count * n > 6000) n /= 2;
            count *= n;
        }
        return size;
    }
    // Of an operation's weight: none, of the array's type, or wide; of one dimension.
    Array column(int64_t count, double scale, bool may_lack = true) const {
        if (may_lack && source.once_in(3)) return Array();
        const int32_t type = source.once_in(2) ? dtype : wide;
        return random_array(source, type, {count}, scale);
    }
    Array like(const Array &x) const { return any_layout(source, x.dtype, x.size, false); }
    static Wide at(const Array &column, int64_t i, Wide otherwise) { return column.given ? column[{i}] : otherwise; }
    static Running cap(Running s, double softcap) { return softcap > 0 ? softcap * tanh(s / softcap) : s; }
    static Running slope_of_cap(Running s, double softcap) {
        if (softcap <= 0) return 1;
        const Running t = tanh(s / softcap);
        return (Running(1) - t) * (Running(1) + t);
    }
    static Sizes rows_of(const Array &x) { return Sizes(x.size.begin(), x.size.end() - 1); }
    static Sizes joined(Sizes row, int64_t column) {
        row.push_back(column);
        return row;
    }

    bool parametric_swish() {
        const Array x = random_array(source, dtype, shape(), 4), grad_out = random_array(source, dtype, x.size, 1);
        Array out = like(x), grad_x = like(x);
        const int32_t dim = int32_t(source.pick(0, std::max<int64_t>(int64_t(x.size.size()) - 1, 0)));
        const int64_t kind = source.pick(0, 2), count = kind < 2 || x.size.empty() ? 1 : x.size[size_t(dim)];
        const Array betas = kind == 0 ? Array() : column(count, 1, false);
        Array grad_betas(wide, {count});
        const double beta = source.normal();
        const heedful_array x_seen = seen(x), betas_seen = seen(betas), out_seen = seen(out), g_seen = seen(grad_out),
                            grad_x_seen = seen(grad_x), grad_betas_seen = seen(grad_betas);
        bool good = true;
        const bool forward = answered(heedful_parametric_swish(&x_seen, &betas_seen, beta, dim, &out_seen, threads),
                                      "parametric_swish", good);
        const bool backward = answered(heedful_parametric_swish_backward(&g_seen, &x_seen, &betas_seen, beta, dim,
                                                                         &grad_x_seen, &grad_betas_seen, threads),
                                       "parametric_swish_backward", good);
        if (!forward || !backward) return good;
        std::vector<Running> sums(count, Running{});
        for_each_index(x.size, [&](const Sizes &i) {
            const int64_t which = count > 1 ? i[size_t(dim)] : 0;
            const Running v = x[i], g = grad_out[i];
            // A number is rounded to the type that is computed in.
            const Running b = betas.given ? Running(betas[{which}]) : Running(beta, std::fabs(beta));
            const Running t = b * v, s = sigmoid(t), rest = sigmoid(-t);
            sums[size_t(which)] = sums[size_t(which)] + g * v * v * s * rest;
            good = good && near(out, i, v * s, "swish") && near(grad_x, i, g * (s + t * s * rest), "swish grad_x");
        });
        for (int64_t i = 0; i < count; ++i) good = good && near(grad_betas, {i}, sums[size_t(i)], "grad_betas");
        return good;
    }

    static Running activation(int64_t kind, Running x, Running &slope) {
        if (kind == HEEDFUL_GELU) {
            const Running below = normal_below(x);
            slope = below + x * normal_density(x);
            return x * below;
        }
        const bool tanh = kind == HEEDFUL_GELU_TANH;
        const Wide rate = 1.59576912160573071175978L, cube = 0.044715L;
        const Running t = tanh ? x * (Running(rate) + Running(rate * cube) * x * x) : x;
        const Running steep = tanh ? Running(rate) + Running(3 * rate * cube) * x * x : Running(1);
        const Running s = sigmoid(t), rest = sigmoid(-t);
        // 1 - s is taken from a rounded s.
        const Wide lost = std::fabs(s.value * x.value * steep.value);
        slope = s + s * x * steep * Running(rest.value, rest.error) + Running(0, lost);
        return x * s;
    }

    bool gated() {
        const Array gate = random_array(source, dtype, shape(), 4), up = random_array(source, dtype, gate.size, 1),
                    grad_out = random_array(source, dtype, gate.size, 1);
        Array out = like(gate), grad_gate = like(gate), grad_up = like(gate);
        const int32_t kind = int32_t(source.pick(0, 2));
        const heedful_array gate_seen = seen(gate), up_seen = seen(up), out_seen = seen(out), g_seen = seen(grad_out),
                            grad_gate_seen = seen(grad_gate), grad_up_seen = seen(grad_up);
        bool good = true;
        const bool forward = answered(heedful_gated(&gate_seen, &up_seen, kind, &out_seen, threads), "gated", good);
        const bool backward = answered(
            heedful_gated_backward(&g_seen, &gate_seen, &up_seen, kind, &grad_gate_seen, &grad_up_seen, threads),
            "gated_backward", good);
        if (!forward || !backward) return good;
        for_each_index(gate.size, [&](const Sizes &i) {
            Running slope;
            const Running value = activation(kind, gate[i], slope), u = up[i], g = grad_out[i];
            good = good && near(out, i, value * u, "gated") && near(grad_gate, i, g * u * slope, "grad_gate") &&
                   near(grad_up, i, g * value, "grad_up");
        });
        return good;
    }

    bool row_products() {
        const Array a = random_array(source, dtype, shape(1), 1), b = random_array(source, dtype, a.size, 1);
        Array sums(wide, rows_of(a));
        const heedful_array a_seen = seen(a), b_seen = seen(b), sums_seen = seen(sums);
        bool good = true;
        if (!answered(heedful_row_products(&a_seen, &b_seen, &sums_seen, threads), "row_products", good)) return good;
        for_each_index(rows_of(a), [&](const Sizes &row) {
            Running sum;
            for (int64_t c = 0; c < a.size.back(); ++c)
                sum = sum + Running(a[joined(row, c)]) * Running(b[joined(row, c)]);
            good = good && near(sums, row, sum, "row product");
        });
        return good;
    }

    bool rms_norm() {
        const Array x = random_array(source, dtype, shape(1), 2);
        const int64_t columns = x.size.back();
        const bool residual = source.once_in(2);
        const Array other = residual ? random_array(source, dtype, x.size, 1) : Array(), weight = column(columns, 1),
                    grad_out = random_array(source, dtype, x.size, 1),
                    added = source.once_in(2) ? random_array(source, dtype, x.size, 1) : Array();
        Array out = like(x), sum = like(x), grad_x = like(x), grad_weight(wide, {columns});
        const double eps = source.once_in(2) ? 1e-5 : 0.5;
        const heedful_array x_seen = seen(x), other_seen = seen(other), weight_seen = seen(weight),
                            out_seen = seen(out), sum_seen = seen(sum), g_seen = seen(grad_out),
                            added_seen = seen(added), grad_x_seen = seen(grad_x), grad_weight_seen = seen(grad_weight);
        bool good = true;
        const bool forward = answered(
            residual ? heedful_add_rms_norm(&x_seen, &other_seen, &weight_seen, eps, &out_seen, &sum_seen, threads)
                     : heedful_rms_norm(&x_seen, &weight_seen, eps, &out_seen, threads),
            "rms_norm", good);
        const heedful_array normed_seen = residual ? sum_seen : x_seen;
        const bool backward = answered(heedful_rms_norm_backward(&g_seen, &added_seen, &normed_seen, &weight_seen, eps,
                                                                 &grad_x_seen, &grad_weight_seen, threads),
                                       "rms_norm_backward", good);
        if (!forward || !backward) return good;
        const Array &normed = residual ? sum : x;
        std::vector<Running> sums(columns, Running{});
        for_each_index(rows_of(x), [&](const Sizes &row) {
            Running squares, along;
            for (int64_t c = 0; c < columns; ++c) {
                const Sizes i = joined(row, c);
                if (residual) good = good && near(sum, i, Running(x[i]) + Running(other[i]), "sum");
                const Running v = normed[i];
                squares = squares + v * v;
                along = along + Running(grad_out[i]) * Running(at(weight, c, 1)) * v;
            }
            const Running mean = squares / Running(columns) + Running(eps, eps), r = Running(1) / sqrt(mean);
            for (int64_t c = 0; c < columns; ++c) {
                const Sizes i = joined(row, c);
                const Running v = Running(normed[i]) * r, w = at(weight, c, 1), g = grad_out[i];
                Running grad = r * (g * w) - r * r * (along / Running(columns)) * v;
                if (added.given) grad = grad + Running(added[i]);
                sums[size_t(c)] = sums[size_t(c)] + g * v;
                good = good && near(out, i, v * w, "rms_norm") && near(grad_x, i, grad, "rms_norm grad_x");
            }
        });
        for (int64_t c = 0; c < columns; ++c) good = good && near(grad_weight, {c}, sums[size_t(c)], "grad_weight");
        return good;
    }

    bool layer_norm_gelu() {
        const Array x = random_array(source, dtype, shape(1), 2);
        const int64_t columns = x.size.back();
        const Array weight = column(columns, 1), bias = column(columns, 1),
                    grad_out = random_array(source, dtype, x.size, 1);
        Array out = like(x), grad_x = like(x), grad_weight(wide, {columns}), grad_bias(wide, {columns});
        const int32_t tanh = int32_t(source.pick(0, 1));
        const double eps = 0.25; // a row of one value has no direction: its gradient is all rounding at a small eps
        const heedful_array x_seen = seen(x), weight_seen = seen(weight), bias_seen = seen(bias), out_seen = seen(out),
                            g_seen = seen(grad_out), grad_x_seen = seen(grad_x), grad_weight_seen = seen(grad_weight),
                            grad_bias_seen = seen(grad_bias);
        bool good = true;
        const bool forward =
            answered(heedful_layer_norm_gelu(&x_seen, &weight_seen, &bias_seen, eps, tanh, &out_seen, threads),
                     "layer_norm_gelu", good);
        const bool backward =
            answered(heedful_layer_norm_gelu_backward(&g_seen, &x_seen, &weight_seen, &bias_seen, eps, tanh,
                                                      &grad_x_seen, &grad_weight_seen, &grad_bias_seen, threads),
                     "layer_norm_gelu_backward", good);
        if (!forward || !backward) return good;
        std::vector<Running> of_weight(columns, Running{}), of_bias = of_weight;
        const int64_t kind = tanh ? HEEDFUL_GELU_TANH : HEEDFUL_GELU;
        const Running n = Wide(columns);
        for_each_index(rows_of(x), [&](const Sizes &row) {
            Running mean, squares, even, along;
            for (int64_t c = 0; c < columns; ++c) mean = mean + Running(x[joined(row, c)]);
            mean = mean / n;
            const auto centred = [&](int64_t c) { return Running(x[joined(row, c)]) - mean; };
            for (int64_t c = 0; c < columns; ++c) squares = squares + centred(c) * centred(c);
            const Running r = Running(1) / sqrt(squares / n + Running(eps));
            std::vector<Running> arriving(columns, Running{});
            for (int64_t c = 0; c < columns; ++c) {
                const Sizes i = joined(row, c);
                const Running y = centred(c) * r, w = at(weight, c, 1);
                Running slope;
                const Running value = activation(kind, y * w + Running(at(bias, c, 0)), slope);
                const Running d = Running(grad_out[i]) * slope;
                good = good && near(out, i, value, "layer_norm_gelu");
                of_weight[size_t(c)] = of_weight[size_t(c)] + d * y;
                of_bias[size_t(c)] = of_bias[size_t(c)] + d;
                arriving[size_t(c)] = d * w;
                even = even + d * w;
                along = along + d * w * y;
            }
            for (int64_t c = 0; c < columns; ++c) {
                const Running grad = r * (arriving[size_t(c)] - even / n - centred(c) * r * (along / n));
                good = good && near(grad_x, joined(row, c), grad, "layer_norm_gelu grad_x");
            }
        });
        for (int64_t c = 0; c < columns; ++c)
            good = good && near(grad_weight, {c}, of_weight[size_t(c)], "grad_weight") &&
                   near(grad_bias, {c}, of_bias[size_t(c)], "grad_bias");
        return good;
    }

    bool rope() {
        Sizes size = shape(1);
        const int64_t pairs = source.pick(0, size.back() / 2), table_rows = source.pick(1, 9);
        const Array x = random_array(source, dtype, size, 1);
        Array out = like(x), positions;
        const bool listed = source.once_in(2), interleaved = source.once_in(2), inverse = source.once_in(2);
        // Sizes that broadcast: some dimensions in front left out, some of 1.
        const auto broadcasting = [&](Sizes whole) {
            whole.erase(whole.begin(), whole.begin() + source.pick(0, int64_t(whole.size())));
            for (int64_t &n : whole) n = source.once_in(3) ? 1 : n;
            return whole;
        };
        Sizes table = listed ? Sizes{table_rows} : broadcasting(rows_of(x));
        table.push_back(pairs);
        const int32_t type = source.once_in(2) ? dtype : wide;
        const Array cos = random_array(source, type, table, 1), sin = random_array(source, type, table, 1);
        if (listed)
            positions = any_layout(source, source.once_in(2) ? HEEDFUL_INT32 : HEEDFUL_INT64, broadcasting(rows_of(x)))
                            .fill([&] { return double(source.pick(0, table_rows - 1)); });
        const heedful_array x_seen = seen(x), cos_seen = seen(cos), sin_seen = seen(sin), out_seen = seen(out),
                            positions_seen = positions.seen(); // unread numbers could be no positions
        bool good = true;
        if (!answered(heedful_rope(&x_seen, &cos_seen, &sin_seen, listed ? &positions_seen : nullptr, interleaved,
                                   inverse, &out_seen, threads),
                      "rope", good))
            return good;
        for_each_index(rows_of(x), [&](const Sizes &row) {
            const Sizes place = listed ? Sizes{int64_t(positions.get(row))} : row;
            for (int64_t c = 0; c < size.back(); ++c) {
                const int64_t pair = interleaved ? c / 2 : c % std::max<int64_t>(pairs, 1);
                if (c >= 2 * pairs) {
                    good = good && near(out, joined(row, c), x[joined(row, c)], "rope");
                    continue;
                }
                const bool second = interleaved ? c % 2 : c >= pairs;
                const Running a = x[joined(row, interleaved ? 2 * pair : pair)],
                              b = x[joined(row, interleaved ? 2 * pair + 1 : pairs + pair)];
                const Running cosine = cos[joined(place, pair)], sine = (inverse ? -1 : 1) * sin[joined(place, pair)];
                good =
                    good && near(out, joined(row, c), second ? b * cosine + a * sine : a * cosine - b * sine, "rope");
            }
        });
        return good;
    }

    bool softmax() {
        const Array x = random_array(source, dtype, shape(1), 3), grad_out = random_array(source, dtype, x.size, 1);
        const int64_t kind = source.pick(0, 3), columns = x.size.back();
        Array mask, out = like(x), grad_x = like(x), grad_scores = any_layout(source, wide, x.size, false);
        if (kind > 0) {
            Sizes size = x.size;
            size.erase(size.begin(), size.begin() + source.pick(0, int64_t(size.size())));
            for (int64_t &n : size) n = source.once_in(3) ? 1 : n;
            mask = any_layout(source, kind == 1 ? int32_t(HEEDFUL_BOOL) : kind == 2 ? dtype : wide, size);
            mask.fill([&] {
                const bool kept = !source.once_in(4);
                return kind == 1 ? double(kept) : kept ? source.normal() : -INFINITE;
            });
        }
        const double scale = source.normal(), softcap = source.once_in(3) ? 3.0 : 0.0;
        const heedful_array x_seen = seen(x), mask_seen = seen(mask), out_seen = seen(out), g_seen = seen(grad_out),
                            grad_x_seen = seen(grad_x), grad_scores_seen = seen(grad_scores);
        bool good = true;
        const bool forward =
            answered(heedful_softmax(&x_seen, &mask_seen, scale, softcap, &out_seen, threads), "softmax", good);
        const bool backward = answered(heedful_softmax_backward(&g_seen, &out_seen, &x_seen, scale, softcap,
                                                                &grad_x_seen, &grad_scores_seen, threads),
                                       "softmax_backward", good);
        if (!forward || !backward) return good;
        const Running factor(scale, std::fabs(scale)), none(-INFINITE);
        for_each_index(rows_of(x), [&](const Sizes &row) {
            std::vector<Running> s(columns, Running{});
            Wide most = -INFINITE;
            Running sum, mean;
            for (int64_t c = 0; c < columns; ++c) {
                const Sizes i = joined(row, c);
                s[size_t(c)] = cap(Running(x[i]) * factor, softcap);
                const Wide m = kind > 0 ? mask[i] : 0;
                if (kind == 1 ? m == 0 : kind > 1 && m == -INFINITE) s[size_t(c)] = none;
                else if (kind > 1) s[size_t(c)] = s[size_t(c)] + Running(m);
                most = std::max(most, s[size_t(c)].value);
            }
            for (Running &each : s) {
                each = each.value == -INFINITE ? Running() : exp(each - Running(most));
                sum = sum + each;
            }
            for (int64_t c = 0; c < columns; ++c) {
                const Sizes i = joined(row, c);
                good = good && near(out, i, sum.value == 0 ? Running() : s[size_t(c)] / sum, "softmax");
                mean = mean + Running(grad_out[i]) * Running(out[i]);
            }
            for (int64_t c = 0; c < columns; ++c) {
                const Sizes i = joined(row, c);
                const Running grad = Running(out[i]) * (Running(grad_out[i]) - mean);
                good = good && near(grad_scores, i, grad, "grad_scores") &&
                       near(grad_x, i, grad * factor * slope_of_cap(Running(x[i]) * factor, softcap), "softmax grad_x");
            }
        });
        return good;
    }

    // All classes at once, or in parts.
    bool cross_entropy() {
        const int64_t rows = source.pick(0, 9), classes = source.once_in(3) ? source.pick(1, 900) : source.pick(1, 40);
        const int64_t part = source.once_in(2) ? classes : source.pick(1, classes);
        Array targets = any_layout(source, HEEDFUL_INT64, {rows}, false);
        targets.fill([&] { return double(source.once_in(5) ? -1 : source.pick(0, classes - 1)); });
        const Array grad_losses = random_array(source, wide, {rows}, 1),
                    grad_lse = source.once_in(2) ? random_array(source, wide, {rows}, 1) : Array();
        Array losses(wide, {rows}), lse(wide, {rows}), statistics(HEEDFUL_FLOAT64, {rows, 4});
        heedful_cross_entropy_terms terms = {0, classes, -1, source.once_in(2) ? 0.0 : 0.3,
                                             source.once_in(3) ? 4.0 : 0.0};
        std::vector<Array> logits, grads;
        bool good = true;
        // Contents of damaged targets could be no classes, which is told, and lse may be read before it is written.
        const heedful_array targets_seen = targets.seen(), losses_seen = seen(losses), lse_seen = lse.seen(),
                            statistics_seen = seen(statistics), grad_losses_seen = seen(grad_losses),
                            grad_lse_seen = seen(grad_lse);
        for (terms.first = 0; terms.first < classes; terms.first += part) {
            const int64_t columns = std::min(part, classes - terms.first);
            logits.push_back(random_array(source, dtype, {rows, columns}, 3));
            const heedful_array seen_part = seen(logits.back());
            if (!answered(heedful_cross_entropy(&seen_part, &targets_seen, &terms, &statistics_seen, &losses_seen,
                                                &lse_seen, threads),
                          "cross_entropy", good) &&
                !good)
                return false;
        }
        for (size_t index = 0; index < logits.size(); ++index) {
            terms.first = int64_t(index) * part;
            grads.push_back(like(logits[index]));
            const heedful_array seen_part = seen(logits[index]), seen_grad = seen(grads.back());
            if (!answered(heedful_cross_entropy_backward(&grad_losses_seen, &grad_lse_seen, &seen_part, &targets_seen,
                                                         &terms, &lse_seen, &seen_grad, threads),
                          "cross_entropy_backward", good) &&
                !good)
                return false;
        }
        if (spoil) return true;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t target = int64_t(targets.get({row}));
            std::vector<Running> s;
            Running sum, total;
            Wide most = -INFINITE;
            for (int64_t c = 0; c < classes; ++c) {
                s.push_back(cap(logits[size_t(c / part)][{row, c % part}], terms.softcap));
                most = std::max(most, s.back().value);
                total = total + s.back();
            }
            for (const Running &each : s) sum = sum + exp(each - Running(most));
            const Running whole = log(sum) + Running(most), e(terms.smoothing, terms.smoothing);
            Running loss;
            if (target >= 0) loss = whole - (Running(1) - e) * s[size_t(target)] - e * (total / Running(classes));
            good = good && near(lse, {row}, whole, "lse") && near(losses, {row}, loss, "loss");
            const Running g = target >= 0 ? Running(grad_losses[{row}]) : Running(), less = g * (e / Running(classes));
            const Running share = g + Running(grad_lse.given ? grad_lse[{row}] : 0);
            for (int64_t c = 0; c < classes; ++c) {
                Running grad = share * exp(s[size_t(c)] - Running(lse[{row}])) - less;
                if (c == target) grad = grad - g * (Running(1) - e);
                const Running x = logits[size_t(c / part)][{row, c % part}];
                good = good && near(grads[size_t(c / part)], {row, c % part}, grad * slope_of_cap(x, terms.softcap),
                                    "grad_logits");
            }
        }
        return good;
    }

    bool any() {
        switch (source.pick(0, 7)) {
        case 0:
            return parametric_swish();
        case 1:
            return gated();
        case 2:
            return row_products();
        case 3:
            return rms_norm();
        case 4:
            return layer_norm_gelu();
        case 5:
            return rope();
        case 6:
            return softmax();
        default:
            return cross_entropy();
        }
    }
};

} // namespace reference
