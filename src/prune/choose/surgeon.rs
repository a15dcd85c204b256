//! Greedy elimination with least squares in mind: which inputs does a projection miss least when those that stay take over?
//!
//! Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1992) for whole columns, as ZipLM does it (Kurtić, Frantar and Alistarh,
//! NeurIPS 2023, arXiv 2302.04089, section 3.1). With H = C + λI over the inputs that are left and P = H⁻¹, removing the inputs
//! R and refitting the others costs tr(W_R (P_RR)⁻¹ W_Rᵀ) of squared error. The cheapest go, then
//! W_S −= W_R (P_RR)⁻¹ P_RS and P_SS −= P_SR (P_RR)⁻¹ P_RS, and so on.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::{Accum, Mat, Par, Side};

use crate::prune::collect::{Covariance, RIDGE};

/// Units of one input go together in so many steps. Inputs that go in one step do not take each other over, so that more
/// steps are better; each costs a pass over P.
const STEPS: usize = 32;

/// For every input of W `[outputs, inputs]`, row-major, in units of `unit` adjacent inputs: what the unit's removal cost when
/// its turn came, made monotone, so that the order of scores is the order of removal. `None` if C + λI is not positive
/// definite.
pub fn losses(w: &[f32], outputs: usize, covariance: &Covariance, unit: usize) -> Option<Vec<f64>> {
    let inputs = covariance.features();
    let mut left: Vec<usize> = (0..inputs / unit).collect();
    let mut scores = vec![0.0; inputs];
    let ridge =
        RIDGE * (0..inputs).map(|j| covariance.get(j, j)).sum::<f64>() / inputs.max(1) as f64;
    let h = Mat::from_fn(inputs, inputs, |i, j| match i < j {
        true => 0.0, // Only the lower triangle is read.
        false => covariance.get(i, j) + if i == j { ridge } else { 0.0 },
    });
    let mut p = h.llt(Side::Lower).ok()?.inverse();
    drop(h);
    // Inputs in rows, so that what belongs to an input lies together when W is cut to those that are left.
    let mut w = Mat::from_fn(inputs, outputs, |i, j| f64::from(w[j * inputs + i]));
    let at_a_time = if unit == 1 {
        left.len().div_ceil(STEPS)
    } else {
        1
    };
    let mut floor = 0.0f64;
    while !left.is_empty() {
        let mut costs: Vec<(f64, usize)> = (0..left.len())
            .map(|place| (cost(&w, &p, place, unit), place))
            .collect();
        costs.sort_by(|a, b| a.0.total_cmp(&b.0));
        costs.truncate(at_a_time);
        for (cost, place) in &costs {
            // Equal scores would leave the order to chance.
            floor = cost.max(floor * (1.0 + 1e-12));
            scores[left[*place] * unit..][..unit].fill(floor);
        }
        let mut gone: Vec<usize> = costs.into_iter().map(|(_, place)| place).collect();
        gone.sort_unstable();
        let stay: Vec<usize> = (0..left.len())
            .filter(|place| gone.binary_search(place).is_err())
            .collect();
        left = stay.iter().map(|place| left[*place]).collect();
        let spread = |places: &[usize]| -> Vec<usize> {
            places
                .iter()
                .flat_map(|place| place * unit..(place + 1) * unit)
                .collect()
        };
        let (r, s) = (spread(&gone), spread(&stay));
        let p_rr = Mat::from_fn(r.len(), r.len(), |i, j| p[(r[i], r[j])]);
        let p_sr = Mat::from_fn(s.len(), r.len(), |i, j| p[(s[i], r[j])]);
        let w_r = Mat::from_fn(r.len(), outputs, |i, j| w[(r[i], j)]);
        let solver = p_rr.llt(Side::Lower).ok()?;
        let taken = solver.solve(p_sr.transpose());
        let mut next = Mat::from_fn(s.len(), s.len(), |i, j| p[(s[i], s[j])]);
        matmul(&mut next, Accum::Add, &p_sr, &taken, -1.0, Par::Seq);
        p = next;
        let mut next = Mat::from_fn(s.len(), outputs, |i, j| w[(s[i], j)]);
        matmul(
            &mut next,
            Accum::Add,
            taken.transpose(),
            &w_r,
            -1.0,
            Par::Seq,
        );
        w = next;
    }
    scores.iter().all(|v| v.is_finite()).then_some(scores)
}

/// tr(W_Rᵀ (P_RR)⁻¹ W_R) of the unit at `place`, with inputs in W's rows.
fn cost(w: &Mat<f64>, p: &Mat<f64>, place: usize, unit: usize) -> f64 {
    let first = place * unit;
    if unit == 1 {
        let square: f64 = (0..w.ncols()).map(|j| w[(first, j)] * w[(first, j)]).sum();
        return square / p[(first, first)];
    }
    let w_r = w.submatrix(first, 0, unit, w.ncols());
    match p.submatrix(first, first, unit, unit).llt(Side::Lower) {
        Ok(solver) => {
            let solved = solver.solve(w_r);
            (0..w.ncols())
                .map(|j| (0..unit).map(|i| w_r[(i, j)] * solved[(i, j)]).sum::<f64>())
                .sum()
        }
        Err(_) => f64::INFINITY,
    }
}
