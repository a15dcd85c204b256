//! What can be chosen about sampling: all of it ([`SamplerConfig`]), or the part that somebody asks for ([`SamplerOptions`]).

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
            /// What is asked for here, and by default what llama.cpp defaults to.
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
    /// How many of the last tokens, of prompt and answer, the penalty looks at; `usize::MAX` for all.
    repetition_window: usize = 64;
    /// Keeps the k most likely tokens; 0 for all.
    top_k: usize = 40;
    /// Keeps the most likely tokens that together have this probability (Holtzman et al., arXiv 1904.09751); 1 for all.
    top_p: f32 = 0.95;
    /// Keeps tokens of at least this share of the best one's probability (arXiv 2407.01082); 0 for all.
    min_p: f32 = 0.05;
    /// Divides the logits of what is kept; 0 takes the most likely token always.
    temperature: f32 = 0.8;
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
}

impl SamplerOptions {
    /// These settings, and the other's where there are none here. Who asks for temperature 0 here gets the most likely token, and
    /// none of the penalties of the other, which were meant for another temperature.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        let mut other = other.clone();
        if self.temperature == Some(0.0) {
            other.repetition_penalty = None;
        }
        self.filled_from(other)
    }
}
