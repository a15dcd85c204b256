//! The modules of a model, in the order in which a token passes through them.

use std::fmt;
use std::ops::Range;

/// The two kinds of modules that a layer has. Each reads the residual stream through a norm and adds its output to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Module {
    Attention,
    Mlp,
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Module::Attention => "attention",
            Module::Mlp => "MLP",
        })
    }
}

/// One module of a model: the attention or the MLP of a layer. Ordered as a token passes through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(usize);

impl ModuleId {
    pub const fn attention(layer: usize) -> Self {
        Self(2 * layer)
    }

    pub const fn mlp(layer: usize) -> Self {
        Self(2 * layer + 1)
    }

    pub const fn layer(self) -> usize {
        self.0 / 2
    }

    pub const fn kind(self) -> Module {
        match self.0 % 2 {
            0 => Module::Attention,
            _ => Module::Mlp,
        }
    }

    /// Its place among all modules of a model: where lists with an entry for each module have it.
    pub const fn index(self) -> usize {
        self.0
    }

    /// The module with this [`ModuleId::index`].
    pub const fn from_index(index: usize) -> Self {
        Self(index)
    }

    /// The module that follows; behind the last one this is where [`ModuleId::all`] ends.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// All modules of so many layers.
    pub const fn all(layers: usize) -> Range<Self> {
        Self(0)..Self(2 * layers)
    }

    /// The modules of a range, in order.
    pub fn each(range: Range<Self>) -> impl Iterator<Item = Self> {
        (range.start.0..range.end.0).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_attention_comes_before_its_mlp() {
        let all: Vec<_> = ModuleId::each(ModuleId::all(2))
            .map(|m| (m.layer(), m.kind(), m.index()))
            .collect();
        let expected = [
            (0, Module::Attention, 0),
            (0, Module::Mlp, 1),
            (1, Module::Attention, 2),
            (1, Module::Mlp, 3),
        ];
        assert_eq!(all, expected);
        assert_eq!(ModuleId::attention(1).next(), ModuleId::mlp(1));
        assert_eq!(ModuleId::mlp(0).next(), ModuleId::attention(1));
    }
}
