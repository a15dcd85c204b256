//! Weights times activations.

use std::ops::Range;

use super::team::SharedSlice;
use super::{
    Activations, Keep, Kernels, MatrixView, Precision, Store, TILE_COLS, Team, call, sys,
    with_scratch,
};
use crate::quant::GROUP;

/// Rows that a thread takes at a time when there are many tokens; the more, the less often the activations pass through its
/// caches.
const PANEL_ROWS: usize = 128;
/// Panels are lower where each thread would get fewer of them than this.
const PANELS_PER_THREAD: usize = 6;

/// One matrix of a [`matmul`] and where its product goes.
pub struct Product<'w, 'o> {
    pub weights: MatrixView<'w>,
    /// `[tokens, rows]`
    pub out: &'o mut [f32],
}

/// out = X Wᵀ for several matrices that share their input, in one step of the team; work is split by bytes.
///
/// # Panics
/// If a shape does not fit.
pub fn matmul(team: &Team, x: &mut Activations, products: &mut [Product]) {
    matmul_then(team, x, products, |_, _, _, _| {});
}

/// As [`matmul`], and every thread hands over what it has multiplied while it is in the cache:
/// `then(product, token, rows, values)`. Rows begin and end at groups or with the matrix.
///
/// # Panics
/// If a shape does not fit.
pub fn matmul_then(
    team: &Team,
    x: &mut Activations,
    products: &mut [Product],
    then: impl Fn(usize, usize, Range<usize>, &mut [f32]) + Sync,
) {
    let kernels = team.kernels();
    let one = x.tokens().is_one_generated();
    let tokens = x.tokens().count;
    if tokens == 0 {
        return;
    }
    if x.cols() == 0 {
        // A layer that lost all of its heads or channels: the sum over nothing.
        for (j, product) in products.iter_mut().enumerate() {
            product.out.fill(0.0);
            let rows = product.weights.rows();
            for (t, row) in product.out.chunks_exact_mut(rows.max(1)).enumerate() {
                then(j, t, 0..rows, row);
            }
        }
        return;
    }
    for product in products.iter() {
        assert_eq!(product.weights.cols(), x.cols(), "columns of a matrix");
        assert_eq!(
            product.out.len(),
            tokens * product.weights.rows(),
            "room for a product"
        );
    }
    let weights: Vec<MatrixView> = products.iter().map(|p| p.weights).collect();
    let activations = x.for_readers(team, &weights);
    let x = SharedActivations(&activations);
    let jobs: Vec<Job> = products
        .iter_mut()
        .map(|p| Job {
            weights: p.weights,
            stride: p.weights.rows(),
            out: SharedSlice::new(p.out),
        })
        .collect();

    let hand_over = |j: usize, rows: Range<usize>| {
        let job = &jobs[j];
        for t in 0..tokens {
            let first = t * job.stride;
            // SAFETY: called by the thread that has just multiplied these rows.
            let values = unsafe { job.out.range(first + rows.start..first + rows.end) };
            then(j, t, rows.clone(), values);
        }
    };
    if !one {
        let rows: usize = jobs.iter().map(|job| job.stride).sum();
        let height = panel_height(team, rows, kernels.table().row_granule);
        let panels: Vec<(usize, usize)> = jobs
            .iter()
            .enumerate()
            .flat_map(|(j, job)| (0..job.stride).step_by(height).map(move |row| (j, row)))
            .collect();
        team.items(panels.len(), |i| {
            let (j, row) = panels[i];
            let end = (row + height).min(jobs[j].stride);
            // SAFETY: every panel is handed out once.
            unsafe { jobs[j].run(kernels, row..end, &x, Store::Replace) };
            hand_over(j, row..end);
        });
    } else {
        let total: usize = jobs.iter().map(|job| job.weights.bytes()).sum();
        let threads = team.threads();
        team.shares(|share| {
            let share = total * share / threads..total * (share + 1) / threads;
            let mut base = 0;
            let parts: Vec<sys::fk_rows> = jobs
                .iter()
                .map(|job| {
                    let begin = job.row_at(share.start, base);
                    let end = job.row_at(share.end, base);
                    base += job.weights.bytes();
                    job.part(begin, end)
                })
                .collect();
            // SAFETY: the weights' bytes, the activations (in the form that was asked for) and the output were checked against the
            // shape above and by `MatrixView::new`; one share's end is the next one's beginning, so that no row has two.
            unsafe { matvec(kernels, &parts, x.get()) };
            for (j, part) in parts.iter().enumerate() {
                hand_over(j, part.begin..part.end);
            }
        });
    }
}

/// out += X Wᵀ + bias, with out `[tokens, rows]`.
///
/// # Panics
/// If a shape does not fit.
pub fn matmul_add(
    team: &Team,
    x: &mut Activations,
    weights: MatrixView,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let kernels = team.kernels();
    let (tokens, all) = (x.tokens(), weights.rows());
    assert_eq!(out.len(), tokens.count * all, "room for a product");
    assert!(bias.is_none_or(|b| b.len() == all), "a bias for every row");
    let job = Job {
        weights,
        stride: all,
        out: SharedSlice::new(out),
    };
    // What is there of these rows of token t.
    let row = |t: usize, rows: Range<usize>| {
        // SAFETY: every panel of rows has one worker.
        unsafe { job.out.range(t * all + rows.start..t * all + rows.end) }
    };
    let add_bias = |rows: Range<usize>| {
        let Some(bias) = bias else { return };
        for t in 0..tokens.count {
            kernels.add(row(t, rows.clone()), &bias[rows.clone()]);
        }
    };
    if tokens.is_one_generated() || x.cols() == 0 {
        by_panels(team, x, &[weights], 1, |rows, product| {
            for (t, product) in product.chunks_exact(rows.len()).enumerate() {
                kernels.add(row(t, rows.clone()), product);
            }
            add_bias(rows);
        });
        return;
    }
    if tokens.count == 0 || all == 0 {
        return;
    }
    assert_eq!(weights.cols(), x.cols(), "columns of a matrix");
    let activations = x.for_readers(team, &[weights]);
    let x = SharedActivations(&activations);
    let height = panel_height(team, all, kernels.table().row_granule);
    team.items(all.div_ceil(height), |i| {
        let rows = i * height..((i + 1) * height).min(all);
        // SAFETY: every panel is handed out once.
        unsafe { job.run(kernels, rows.clone(), &x, Store::Add) };
        add_bias(rows);
    });
}

/// What is applied to the gate of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    /// x / (1 + e^−x)
    #[default]
    Silu,
    /// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2
    Gelu,
}

impl Gate {
    /// gates = gate(gates) · ups
    fn apply(self, kernels: Kernels, gates: &mut [f32], ups: &[f32]) {
        match self {
            Gate::Silu => kernels.silu_mul(gates, ups),
            Gate::Gelu => kernels.gelu_mul(gates, ups),
        }
    }
}

/// out = activation(X Wgᵀ + bg) · (X Wuᵀ + bu) `[tokens, channels]`, in the forms that `readers` will ask for, and what `keep`
/// asks for.
///
/// # Panics
/// If a shape does not fit.
#[allow(clippy::too_many_arguments)] // two matrices, an input, an output, and who computes
pub fn matmul_gated(
    team: &Team,
    x: &mut Activations,
    activation: Gate,
    gate: (MatrixView, Option<&[f32]>),
    up: (MatrixView, Option<&[f32]>),
    out: &mut Activations,
    readers: &[MatrixView],
    keep: Keep,
) {
    let kernels = team.kernels();
    assert_eq!(gate.0.rows(), up.0.rows(), "channels of gate and up");
    let sink = out.sink(
        kernels,
        x.tokens(),
        gate.0.rows(),
        readers,
        keep,
        Precision::Normal,
    );
    let weights = [gate.0, up.0];
    by_panels(team, x, &weights, TILE_COLS, |rows, products| {
        let (gates, ups) = products.split_at_mut(products.len() / 2);
        for (products, bias) in [(&mut *gates, gate.1), (&mut *ups, up.1)] {
            let Some(bias) = bias else { continue };
            for row in products.chunks_exact_mut(rows.len()) {
                kernels.add(row, &bias[rows.clone()]);
            }
        }
        activation.apply(kernels, gates, ups);
        // SAFETY: every panel of rows has one worker, and begins at a whole tile.
        unsafe { sink.put(0..sink.tokens(), rows, gates) };
    });
}

/// Computes rows of matrices of one shape panel by panel, and hands every panel over while it is in the cache:
/// `then(rows, products)` with products `[weights.len(), tokens, rows.len()]`. Panels begin at multiples of `align`.
fn by_panels(
    team: &Team,
    x: &mut Activations,
    weights: &[MatrixView],
    align: usize,
    then: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    let kernels = team.kernels();
    let one = x.tokens().is_one_generated();
    let (tokens, rows) = (x.tokens().count, weights[0].rows());
    if tokens == 0 || rows == 0 {
        return;
    }
    for w in weights {
        assert!(
            w.cols() == x.cols() && w.rows() == rows,
            "shape of a matrix"
        );
    }
    let activations = match x.cols() {
        0 => None,
        _ => Some(x.for_readers(team, weights)),
    };
    let activations = activations.as_ref().map(SharedActivations);
    if one {
        let granule = least_common_multiple(GROUP, align);
        let threads = team.threads();
        let border = |share: usize| match share {
            s if s == threads => rows,
            s => (rows * s / threads + granule / 2) / granule * granule,
        };
        team.shares(|share| {
            let rows = border(share).min(rows)..border(share + 1).min(rows);
            if rows.is_empty() {
                return;
            }
            with_scratch(weights.len() * rows.len(), |products| {
                let Some(x) = &activations else {
                    products.fill(0.0);
                    return then(rows, products);
                };
                let views = weights.iter().map(|w| w.rows_in(rows.clone()).to_sys());
                let parts: Vec<sys::fk_rows> = views
                    .zip(products.chunks_exact_mut(rows.len()))
                    .map(|(weights, out)| sys::fk_rows {
                        weights,
                        begin: 0,
                        end: weights.rows,
                        out: out.as_mut_ptr(),
                    })
                    .collect();
                // SAFETY: the rows lie in the matrices, whose bytes were checked by `MatrixView::new`, the activations are in the
                // form that was asked for, and every product has room for its rows.
                unsafe { matvec(kernels, &parts, x.get()) };
                then(rows, products);
            });
        });
        return;
    }
    let phase = x.tokens().phase.to_sys();
    let panel = |rows: Range<usize>| {
        let slab = tokens * rows.len();
        let views = weights.iter().map(|w| w.rows_in(rows.clone()).to_sys());
        let views: Vec<sys::fk_weights> = views.collect();
        // SAFETY: the function has no preconditions.
        let needed =
            |w: &sys::fk_weights| unsafe { call!(kernels, matmul_scratch(w, phase, tokens, 0)) };
        let scratch_len = views.iter().map(needed).max().unwrap_or(0);
        with_scratch(weights.len() * slab + scratch_len, |scratch| {
            let (products, scratch) = scratch.split_at_mut(weights.len() * slab);
            for (view, out) in views.iter().zip(products.chunks_exact_mut(slab)) {
                let Some(x) = &activations else {
                    // A layer that lost all of its heads or channels: the sum over nothing.
                    out.fill(0.0);
                    continue;
                };
                // SAFETY: the rows lie in the matrix, whose bytes were checked by `MatrixView::new`, and the activations are
                // in the form that was asked for; the output has room for the rows of all tokens, and the scratch is as long
                // as asked for.
                unsafe {
                    call!(
                        kernels,
                        matmul(
                            view,
                            0,
                            view.rows,
                            x.get(),
                            0,
                            out.as_mut_ptr(),
                            view.rows,
                            scratch.as_mut_ptr()
                        )
                    );
                }
            }
            then(rows, products);
        });
    };
    let granule = least_common_multiple(kernels.table().row_granule, align);
    let height = panel_height(team, rows, granule);
    team.items(rows.div_ceil(height), |i| {
        panel(i * height..((i + 1) * height).min(rows));
    });
}

/// The products of rows of several matrices and a generated token.
///
/// # Safety
/// The weights' bytes, the activations (in the form that was asked for) and the outputs must be as the kernel has them.
unsafe fn matvec(kernels: Kernels, parts: &[sys::fk_rows], x: &sys::fk_activations) {
    let how = kernels.reading.to_sys();
    // SAFETY: the caller vouches for it.
    unsafe { call!(kernels, matvec(parts.as_ptr(), parts.len(), x, &how)) };
}

/// A prompt has enough work in a panel of rows to share panels out one by one, which evens out threads of unequal speed.
/// A single token has not, and streams memory best in one long run per thread.
fn panel_height(team: &Team, rows: usize, granule: usize) -> usize {
    let fair = rows / (team.threads() * PANELS_PER_THREAD);
    (fair / granule * granule).clamp(granule, PANEL_ROWS.max(granule))
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a / divisor * b
}

struct SharedActivations<'a>(&'a sys::fk_activations);

// SAFETY: the activations are only read while they are shared.
unsafe impl Sync for SharedActivations<'_> {}

impl SharedActivations<'_> {
    fn get(&self) -> &sys::fk_activations {
        self.0
    }
}

struct Job<'w, 'o> {
    weights: MatrixView<'w>,
    stride: usize,
    out: SharedSlice<'o, f32>,
}

impl Job<'_, '_> {
    /// The row where byte `position` of all matrices in a sequence falls, if this one begins at byte `base`; rounded to a
    /// group, and 0 or `rows` outside.
    fn row_at(&self, position: usize, base: usize) -> usize {
        let rows = self.weights.rows();
        let size = self.weights.bytes();
        if position <= base || rows == 0 || size == 0 {
            return if position > base { rows } else { 0 };
        }
        if position >= base + size {
            return rows;
        }
        let row = (position - base) / (size / rows).max(1);
        ((row + GROUP / 2) / GROUP * GROUP).min(rows)
    }

    /// Some rows for one token.
    fn part(&self, begin: usize, end: usize) -> sys::fk_rows {
        sys::fk_rows {
            weights: self.weights.to_sys(),
            begin,
            end,
            out: self.out.as_mut_ptr(),
        }
    }

    /// Computes the products of some rows.
    ///
    /// # Safety
    /// No other thread may compute any of these rows at the same time.
    unsafe fn run(&self, kernels: Kernels, rows: Range<usize>, x: &SharedActivations, into: Store) {
        let (weights, x) = (self.weights.to_sys(), x.get());
        let add = into == Store::Add;
        let added = if add { rows.len() } else { 0 };
        // SAFETY: the function has no preconditions.
        let needed = unsafe { call!(kernels, matmul_scratch(&weights, x.phase, x.tokens, added)) };
        with_scratch(needed, |scratch| {
            // SAFETY: the weights' bytes, the activations (in the form that was asked for) and the output were checked against
            // the shape by those who make jobs and by `MatrixView::new`; the scratch is as long as asked for, and nobody else
            // holds these rows of the output, as the caller vouches.
            unsafe {
                call!(
                    kernels,
                    matmul(
                        &weights,
                        rows.start,
                        rows.end,
                        x,
                        add.into(),
                        self.out.as_mut_ptr(),
                        self.stride,
                        scratch.as_mut_ptr()
                    )
                );
            }
        });
    }
}
