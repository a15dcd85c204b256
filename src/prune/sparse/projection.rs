//! The projections of a layer, and what each of them reads.

use std::fmt;

use crate::model::{Model, Module, ModuleId, Weight};

/// One of the seven projections of a layer, in the order of [`Layer::linears`](crate::model::Layer::linears).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Projection {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// Its place among the projections of a layer.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The module that it belongs to.
    pub const fn module(self) -> Module {
        match self {
            Projection::Query | Projection::Key | Projection::Value | Projection::Output => {
                Module::Attention
            }
            Projection::Gate | Projection::Up | Projection::Down => Module::Mlp,
        }
    }
}

/// A projection of a layer of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerProjection {
    pub layer: usize,
    pub projection: Projection,
}

impl LayerProjection {
    /// The seven of a layer.
    pub fn all(layer: usize) -> impl Iterator<Item = Self> {
        Projection::ALL
            .into_iter()
            .map(move |projection| Self { layer, projection })
    }

    pub fn module(self) -> ModuleId {
        match self.projection.module() {
            Module::Attention => ModuleId::attention(self.layer),
            Module::Mlp => ModuleId::mlp(self.layer),
        }
    }

    /// Its weight `[out, in]`.
    pub fn weight(self, model: &Model) -> &Weight {
        &model.layers[self.layer].linears()[self.projection.index()].weight
    }
}

impl fmt::Display for LayerProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.projection {
            Projection::Query => "query",
            Projection::Key => "key",
            Projection::Value => "value",
            Projection::Output => "attention output",
            Projection::Gate => "MLP gate",
            Projection::Up => "MLP up",
            Projection::Down => "MLP down",
        };
        write!(f, "the {name} projection of layer {}", self.layer)
    }
}
