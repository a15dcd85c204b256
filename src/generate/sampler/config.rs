//! What can be chosen about sampling: all of it ([`SamplerConfig`]), or the part that somebody asks for ([`SamplerOptions`]).

use std::fmt;
use std::str::FromStr;

/// Writes both types from one list, so that neither has a setting that the other lacks.
macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $default:expr;)*) => {
        /// How to choose tokens. The default is what llama.cpp defaults to; the command line has defaults of its own.
        #[derive(Debug, Clone, PartialEq)]
        pub struct SamplerConfig {
            $($(#[$doc])* pub $name: $type,)*
        }

        impl Default for SamplerConfig {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        /// What somebody asks for of a [`SamplerConfig`]; `None` leaves a setting to others.
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct SamplerOptions {
            $($(#[$doc])* pub $name: Option<$type>,)*
        }

        impl SamplerOptions {
            /// What is asked for here, and else what llama.cpp defaults to.
            pub fn config(&self) -> SamplerConfig {
                let default = SamplerConfig::default();
                SamplerConfig { $($name: self.$name.clone().unwrap_or(default.$name),)* }
            }

            /// The settings that are asked for: their names and values, for a log.
            pub fn entries(&self) -> Vec<(&'static str, String)> {
                let mut entries = Vec::new();
                $(entries.extend(self.$name.as_ref().map(|v| (stringify!($name), format!("{v:?}"))));)*
                entries
            }

            fn filled_from(&self, other: Self) -> Self {
                Self { $($name: self.$name.clone().or(other.$name),)* }
            }
        }
    };
}

settings! {
    /// Divides the logits of the last tokens that are positive and multiplies those that are not (Keskar et al., arXiv
    /// 1909.05858); 1 for none.
    repetition_penalty: f32 = 1.0;
    /// How many of the last tokens, of prompt and answer, the repetition, frequency and presence penalties look at;
    /// `usize::MAX` for all.
    repetition_window: usize = 64;
    /// Is taken from a token's logit as often as the token occurs in the window; 0 for none.
    frequency_penalty: f32 = 0.0;
    /// Is taken from a token's logit once if it occurs in the window; 0 for none.
    presence_penalty: f32 = 0.0;
    /// How much less likely a token becomes that would go on repeating what stands in the text already (DRY, "don't repeat
    /// yourself"): this, times [`dry_base`](Self::dry_base) to the power of the tokens repeated beyond
    /// [`dry_allowed_length`](Self::dry_allowed_length), is taken from its logit. 0 for none.
    dry_multiplier: f32 = 0.0;
    dry_base: f32 = 1.75;
    /// Tokens that may be repeated at no cost.
    dry_allowed_length: usize = 2;
    /// How many of the last tokens are searched for what is repeated; `usize::MAX` for all.
    dry_window: usize = 64;
    /// Texts over which no repetition reaches.
    dry_breakers: Vec<String> = ["\n", ":", "\"", "*"].map(str::to_owned).to_vec();
    /// No sequence of so many tokens comes twice, prompt included; 0 for no limit.
    no_repeat_ngram: usize = 0;
    /// Is added to the logits of single tokens before all else. Infinity below zero bans one.
    logit_bias: Vec<(u32, f32)> = Vec::new();
    /// Keeps tokens whose logits are within so many standard deviations of the best one's (arXiv 2411.07641); 0 or less for
    /// all.
    top_n_sigma: f32 = 0.0;
    /// Keeps the k most likely tokens; 0 for all.
    top_k: usize = 40;
    /// Keeps the tokens that are as likely as tokens are on average here, as many as together have this probability (locally
    /// typical sampling, Meister et al., arXiv 2202.00666); 1 for all.
    typical_p: f32 = 1.0;
    /// Keeps the most likely tokens that together have this probability (Holtzman et al., arXiv 1904.09751); 1 for all.
    top_p: f32 = 0.95;
    /// Keeps tokens of at least this share of the best one's probability (arXiv 2407.01082); 0 for all.
    min_p: f32 = 0.05;
    /// How often (a probability) the most likely tokens are taken out, where several reach
    /// [`xtc_threshold`](Self::xtc_threshold): the least likely of these stays ("exclude top choices"). 0 for never.
    xtc_probability: f32 = 0.0;
    xtc_threshold: f32 = 0.1;
    /// Divides the logits of what is kept; 0 takes the most likely token always, whatever is cut off.
    temperature: f32 = 0.8;
    /// Lets the temperature vary by so much in both directions: lower where the model is sure, higher where it is not. 0 for a
    /// fixed one.
    dynatemp_range: f32 = 0.0;
    /// How the entropy of what is kept, as a share of the greatest that it could have, leads to the temperature: to this power.
    dynatemp_exponent: f32 = 1.0;
    /// Mirostat 2.0 (Basu et al., arXiv 2007.14966) in the place of all steps that cut: keeps the surprise of the text near
    /// [`mirostat_tau`](Self::mirostat_tau) bits for each token.
    mirostat: bool = false;
    mirostat_tau: f32 = 5.0;
    /// How quickly it is led there.
    mirostat_eta: f32 = 0.1;
    /// The steps, in the order in which they are applied. A step that is not here is not taken.
    steps: Vec<SamplerStep> = SamplerStep::DEFAULT.to_vec();
    /// The same seed gives the same choices.
    seed: u64 = 0;
}

impl SamplerConfig {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// The same without what keeps text from repeating itself: for who asks for the most likely token, in the place of settings that
    /// were meant for another temperature. [`SamplerOptions::or`] does so too.
    #[must_use]
    pub fn without_penalties(self) -> Self {
        let none = Self::default();
        Self {
            repetition_penalty: none.repetition_penalty,
            frequency_penalty: none.frequency_penalty,
            presence_penalty: none.presence_penalty,
            dry_multiplier: none.dry_multiplier,
            no_repeat_ngram: none.no_repeat_ngram,
            ..self
        }
    }

    /// Each token with the probability that the model gives it.
    pub fn plain(seed: u64) -> Self {
        Self {
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 1.0,
            seed,
            ..Self::default()
        }
    }
}

impl SamplerOptions {
    /// These settings, and the other's where there are none here. Who asks for temperature 0 here gets the most likely token, and
    /// none of the penalties of the other, which were meant for another temperature.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        let mut other = other.clone();
        if self.temperature == Some(0.0) {
            other.repetition_penalty = None;
            other.frequency_penalty = None;
            other.presence_penalty = None;
            other.dry_multiplier = None;
            other.no_repeat_ngram = None;
        }
        self.filled_from(other)
    }
}

/// A step of the chain, with the settings of [`SamplerConfig`] that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SamplerStep {
    /// Repetition, frequency and presence penalty.
    Penalties,
    Dry,
    TopNSigma,
    TopK,
    Typical,
    TopP,
    MinP,
    Xtc,
    Temperature,
}

impl SamplerStep {
    /// All steps, in llama.cpp's order.
    pub const DEFAULT: [Self; 9] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::Typical,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
    ];

    /// The name that llama.cpp has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Penalties => "penalties",
            Self::Dry => "dry",
            Self::TopNSigma => "top_n_sigma",
            Self::TopK => "top_k",
            Self::Typical => "typ_p",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::Xtc => "xtc",
            Self::Temperature => "temperature",
        }
    }

    /// Steps by their names, with semicolons between.
    ///
    /// # Errors
    /// The name that no step has.
    pub fn list(text: &str) -> Result<Vec<Self>, UnknownStep> {
        let names = text.split(';').map(str::trim).filter(|n| !n.is_empty());
        names.map(str::parse).collect()
    }
}

impl fmt::Display for SamplerStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no step of sampling has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no step of sampling named {0:?}")]
pub struct UnknownStep(pub String);

/// Capitals, hyphens, and names without a separator are taken too, as llama.cpp does.
impl FromStr for SamplerStep {
    type Err = UnknownStep;

    fn from_str(text: &str) -> Result<Self, UnknownStep> {
        let plain = |name: &str| name.to_lowercase().replace(['_', '-'], "");
        Ok(match plain(text).as_str() {
            "temp" => Self::Temperature,
            "typ" | "typical" | "typicalp" => Self::Typical,
            "nucleus" => Self::TopP,
            name => Self::DEFAULT
                .into_iter()
                .find(|step| plain(step.name()) == name)
                .ok_or_else(|| UnknownStep(text.to_owned()))?,
        })
    }
}
