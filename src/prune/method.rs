//! Named methods: a recipe for each, by how much time there is.

use super::collect::CurveLevels;
use super::names::named_choices;
use super::recipe::{HeadUnit, Metric, Recipe, Restore, Structure};
use super::restore::sequential;
use crate::model::Model;

named_choices! {
    /// A method of the literature, or ours.
    #[derive(Default)]
    "method" Method {
        /// What measured best: wifv within a module, loss curves between modules, least squares, in sequence where there is
        /// time and text for it. Without the time for curves, al-am in their place.
        #[default]
        Best = "best",
        /// FLAP (An et al., AAAI 2024): wifv, al-am, bias.
        Flap = "flap",
        /// Structured Wanda as FLAP's authors compare with it (section 4.2): wifn, ul-um, no restoration.
        WandaSp = "wanda-sp",
        /// Norms alone, as FLAP's authors compare with it: magnitude, ul-um, no restoration.
        MagnitudeSp = "magnitude-sp",
    }
}

named_choices! {
    /// How much time may be spent on choosing. How much of each is done follows from the time and the model's shape.
    #[derive(Default)]
    "effort" Effort {
        /// Ten seconds: a pass over a short calibration text.
        Fast = "fast",
        /// A minute: loss curves of two points a layer, on a short slice of text.
        #[default]
        Normal = "normal",
        /// Ten minutes: loss curves of five points a layer, on a longer slice; restoration in sequence, where the text is long enough.
        Best = "best",
    }
}

impl Method {
    pub fn recipe(self, effort: Effort) -> Recipe {
        let (metric, structure, restore) = match (self, effort) {
            (Method::Best, Effort::Fast) => (Metric::Wifv, Structure::AlAm, Restore::Auto),
            (Method::Best, _) => (Metric::Wifv, Structure::Curves, Restore::Auto),
            (Method::Flap, _) => (Metric::Wifv, Structure::AlAm, Restore::Bias),
            (Method::WandaSp, _) => (Metric::Wifn, Structure::UlUm, Restore::None),
            (Method::MagnitudeSp, _) => (Metric::Magnitude, Structure::UlUm, Restore::None),
        };
        Recipe {
            metric,
            structure,
            heads: HeadUnit::Query,
            restore,
        }
    }

    /// The recipe where a text of `tokens` tokens can be read again, and `memory` bytes may be taken: [`Method::Best`] with
    /// [`Effort::Best`] then restores in sequence, if the text is long enough for it to pay off.
    pub fn recipe_with_text(
        self,
        effort: Effort,
        model: &Model,
        tokens: usize,
        memory: u64,
    ) -> Recipe {
        let recipe = self.recipe(effort);
        match (self, effort) {
            (Method::Best, Effort::Best)
                if sequential::pays_off(model, tokens)
                    && sequential::bytes(model, tokens) <= memory =>
            {
                Recipe {
                    restore: Restore::Sequential,
                    ..recipe
                }
            }
            _ => recipe,
        }
    }
}

impl Effort {
    /// What loss curves are measured of, where the model leaves time for it.
    pub fn curve_levels(self) -> CurveLevels {
        let (tokens, sequence, stride) = match self {
            Effort::Fast | Effort::Normal => (512, 128, 2),
            Effort::Best => (4096, 256, 1),
        };
        let (mlp, attention): (&[f64], &[f64]) = match self {
            Effort::Fast | Effort::Normal => (&[0.5], &[1.0 / 3.0]),
            Effort::Best => (&[0.25, 0.5, 0.75], &[1.0 / 9.0, 1.0 / 3.0]),
        };
        CurveLevels {
            tokens,
            sequence,
            stride,
            mlp_shares: mlp.to_vec(),
            attention_shares: attention.to_vec(),
        }
    }
}
