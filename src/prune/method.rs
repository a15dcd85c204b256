//! Named methods: a choice for every step.

use super::names::named_choices;
use super::{HeadUnit, Metric, Restore, Structure};

named_choices! {
    /// A method of the literature, or ours.
    "method" Method {
        /// FLAP (An et al., AAAI 2024): wifv, al-am, bias.
        Flap = "flap",
        /// Structured Wanda as FLAP's authors compare with it (section 4.2): wifn, ul-um, no restoration.
        WandaSp = "wanda-sp",
        /// Norms alone, as FLAP's authors compare with it: magnitude, ul-um, no restoration.
        MagnitudeSp = "magnitude-sp",
    }
}

/// A choice for every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    pub metric: Metric,
    pub structure: Structure,
    pub heads: HeadUnit,
    pub restore: Restore,
}

impl Default for Method {
    fn default() -> Self {
        Method::Flap
    }
}

impl Method {
    pub fn recipe(self) -> Recipe {
        let (metric, structure, restore) = match self {
            Method::Flap => (Metric::Wifv, Structure::AlAm, Restore::Bias),
            Method::WandaSp => (Metric::Wifn, Structure::UlUm, Restore::None),
            Method::MagnitudeSp => (Metric::Magnitude, Structure::UlUm, Restore::None),
        };
        Recipe {
            metric,
            structure,
            heads: HeadUnit::Query,
            restore,
        }
    }
}
