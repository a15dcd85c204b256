//! The choices that make a method of pruning, one for every step, as plain names. What each of them computes is in the step
//! that it belongs to.

use serde::{Deserialize, Serialize};

use super::names::named_choices;

named_choices! {
    /// What makes a feature worth keeping. Computed in `choose/metric.rs`.
    "metric" Metric {
        /// Weighted input feature variance, variance_j · ‖W_:j‖² (FLAP, section 3.2).
        Wifv = "wifv",
        /// Input feature variance, variance_j (FLAP, section 4.4).
        Ifv = "ifv",
        /// Weighted input feature norm, mean_i |W_ij| · √(mean square_j): Wanda's metric averaged over a column (Sun et al.,
        /// ICLR 2024, section 3; FLAP, section 4.4).
        Wifn = "wifn",
        /// The squared error that the feature's removal costs when those that stay take over, removed greedily with the
        /// cheapest first (Optimal Brain Surgeon for columns, [`surgeon`](super::surgeon)). Needs covariances.
        Obs = "obs",
        /// The norm of the column, ‖W_:j‖; looks at no text.
        Magnitude = "magnitude",
        /// Uniform random numbers, the same on every run: the floor that other metrics must beat.
        Random = "random",
    }
}

impl Metric {
    /// Whether a profile must have covariances.
    pub fn wants_covariance(self) -> bool {
        self == Metric::Obs
    }
}

named_choices! {
    /// What one threshold spans. AL is all layers together, UL each for itself; AM is all modules (attention and MLP)
    /// together, MM each kind for itself, UM with the same ratio for both. Carried out in `choose/structure.rs`.
    "structure" Structure {
        /// The same ratio in every module of every layer.
        UlUm = "ul-um",
        /// The same ratio in every layer, shared out between its modules by scores.
        UlMm = "ul-mm",
        /// The same ratio for all attention and for all MLPs, each shared out among the layers by scores.
        AlMm = "al-mm",
        /// Everything by scores.
        AlAm = "al-am",
        /// Between modules by measured loss curves ([`curves`](super::curves)), within each by scores.
        Curves = "curves",
    }
}

named_choices! {
    /// What goes or stays as one.
    #[derive(Default)]
    "unit of heads" HeadUnit {
        #[default]
        /// A query head; its KV head goes with the last query head that reads it.
        Query = "query",
        /// A KV head with all the query heads that read it, so that groups stay as large as they were.
        Group = "group",
    }
}

named_choices! {
    /// What is changed in a projection W `[out, in]` that keeps the inputs K and loses the inputs R. Carried out in `restore/`.
    "restoration" Restore {
        /// Nothing.
        None = "none",
        /// The bias W_R μ_R: what the removed inputs contribute on average (FLAP, section 3.4).
        Bias = "bias",
        /// The removed inputs' best linear prediction from those that stay goes into the weights:
        /// B = (C_KK + λI)⁻¹ C_KR, W_K + W_R Bᵀ, bias W_R (μ_R − Bᵀ μ_K), with the covariance C and the mean μ of the inputs and
        /// λ = 10⁻² · mean diag(C_KK): ridge regression of the dense projection's output.
        Lsq = "lsq",
        /// `lsq` layer by layer, on the inputs that the already pruned layers produce and towards the dense model's residual
        /// stream ([`sequential`](super::sequential)). Needs the calibration text itself.
        Sequential = "sequential",
        /// `lsq` where the covariance is known from at least as many tokens as the projection has inputs, else `bias`.
        Auto = "auto",
    }
}

impl Restore {
    /// What loss curves restore a module by, with all before it dense: without drift a sequence is least squares.
    pub fn of_one_module(self) -> Self {
        match self {
            Restore::Sequential => Restore::Auto,
            other => other,
        }
    }

    /// Whether a profile should have covariances.
    pub fn wants_covariance(self) -> bool {
        matches!(self, Restore::Lsq | Restore::Sequential | Restore::Auto)
    }
}

/// A choice for every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Recipe {
    pub metric: Metric,
    pub structure: Structure,
    pub heads: HeadUnit,
    pub restore: Restore,
}

impl Recipe {
    /// Whether a profile must have covariances for it.
    pub fn wants_covariance(&self) -> bool {
        self.metric.wants_covariance() || self.restore.wants_covariance()
    }

    /// Whether a profile must have loss curves for it.
    pub fn wants_curves(&self) -> bool {
        self.structure == Structure::Curves
    }
}
