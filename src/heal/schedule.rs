//! How the learning rate goes: up in a line, then down by a cosine to a tenth.

use std::f64::consts::PI;

/// Steps in which the rate rises. They do not depend on how many there are in all, so that some may be taken before that is known.
pub const WARM_UP: usize = 10;
/// What is left of the rate at the end.
const LEAST: f64 = 0.1;

/// The rate of a step, counted from 0, of so many.
pub fn rate(highest: f32, step: usize, steps: usize) -> f32 {
    if step < WARM_UP {
        return highest * (step + 1) as f32 / WARM_UP as f32;
    }
    let share = (step - WARM_UP + 1) as f64 / (steps - WARM_UP).max(1) as f64;
    let cosine = (1.0 + (PI * share.min(1.0)).cos()) / 2.0;
    highest * (LEAST + (1.0 - LEAST) * cosine) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls_to_a_tenth() {
        let rates: Vec<f32> = (0..110).map(|step| rate(2.0, step, 110)).collect();
        assert!((rates[0] - 0.2).abs() < 1e-6 && rates[9] == 2.0);
        assert!(rates[..10].is_sorted() && rates[10..].is_sorted_by(|a, b| a > b));
        assert!((rates[59] - 1.1).abs() < 1e-5 && (rates[109] - 0.2).abs() < 1e-6);
        // The first steps do not depend on how many there will be.
        assert_eq!(rate(2.0, 2, 5), rate(2.0, 2, 5000));
        assert_eq!(rate(2.0, 4, 5), 1.0);
    }
}
