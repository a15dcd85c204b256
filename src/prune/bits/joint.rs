//! Types and widths together: one price per byte for both.

use super::curves::TypeCurves;
use super::plan::TypePlan;
use crate::model::Model;
use crate::prune::choose::{Plan, Planner, RATIOS};
use crate::prune::error::PruneError;
use crate::prune::names::named_choices;

named_choices! {
    /// By what a model gets smaller.
    #[derive(Default)]
    "way to get smaller" Moves {
        /// Smaller types and narrower modules, whichever costs less for a byte.
        #[default]
        Both = "both",
        /// Heads and channels that go, and no other types.
        Widths = "widths",
        /// Smaller types, and all heads and channels stay.
        Bits = "bits",
    }
}

/// How often the range of prices is halved.
const HALVINGS: usize = 32;
/// Losses of many modules that become narrower add up to more than their sum: by so many times, where a few per cent of all weights
/// go (`docs/pruning.md`). Those of types do not.
const WIDTHS_COST: f64 = 8.0;

/// What widths and types of a model can come to.
#[derive(Debug)]
pub struct Joint<'a> {
    model: &'a Model,
    /// `None` where all heads and channels are to stay.
    planner: Option<&'a Planner<'a>>,
    curves: &'a TypeCurves,
    /// What some places take in any case.
    fixed: TypePlan,
}

/// Widths, and types after them.
#[derive(Debug, Clone, PartialEq)]
pub struct JointPlan {
    /// The share of the layers' weights that goes.
    pub ratio: f64,
    pub widths: Plan,
    pub types: TypePlan,
    /// Bytes of all weights then.
    pub bytes: usize,
}

impl<'a> Joint<'a> {
    /// `fixed` is what some places take in any case.
    pub fn new(
        model: &'a Model,
        planner: Option<&'a Planner<'a>>,
        curves: &'a TypeCurves,
        fixed: TypePlan,
    ) -> Self {
        Self {
            model,
            planner,
            curves,
            fixed,
        }
    }

    /// The cheapest plan that is small enough, by bytes of all weights and of those that no token reads; `None` if there is none.
    ///
    /// # Errors
    /// Those of [`Planner::plan`].
    pub fn smallest(
        &self,
        small_enough: impl Fn(&JointPlan) -> bool,
    ) -> Result<Option<JointPlan>, PruneError> {
        let none = self.plan(0.0, TypePlan::none(self.model))?;
        if small_enough(&none) {
            return Ok(Some(none));
        }
        let Some((low, high)) = self.curves.prices() else {
            return self.by_widths(self.curves.plan(0.0), small_enough);
        };
        // Prices are compared as logarithms; nothing costs less than this.
        let (mut below, mut above) = (low.max(1e-15).ln() - 1.0, high.max(1e-15).ln() + 1.0);
        let most = self.at(above.exp())?;
        if !small_enough(&most) {
            return self.by_widths(most.types, small_enough);
        }
        let mut found = most;
        for _ in 0..HALVINGS {
            let middle = (below + above) / 2.0;
            let plan = self.at(middle.exp())?;
            match small_enough(&plan) {
                true => (above, found) = (middle, plan),
                false => below = middle,
            }
        }
        self.without_slack(found, small_enough).map(Some)
    }

    /// A plan that is small enough, with as much taken back as leaves it so: a large step, like one of the head, may have gone far
    /// beyond what was asked for. Widths first, which cost more, then types by falling price.
    fn without_slack(
        &self,
        mut found: JointPlan,
        small_enough: impl Fn(&JointPlan) -> bool,
    ) -> Result<JointPlan, PruneError> {
        if let (Some(planner), true) = (self.planner, found.ratio > 0.0) {
            let types = found.types.clone();
            let joint = |plan: &Plan, ratio| self.with(plan.clone(), ratio, types.clone());
            let less = planner
                .smallest_ratio(|plan| joint(plan, 0.0).is_ok_and(|plan| small_enough(&plan)))?;
            if let Some((ratio, plan)) = less.filter(|(ratio, _)| *ratio < found.ratio) {
                found = joint(&plan, ratio)?;
            }
        }
        for types in self.curves.steps_back(&found.types) {
            let Some(types) = types(&found.types) else {
                continue;
            };
            let back = self.with(found.widths.clone(), found.ratio, types)?;
            if small_enough(&back) {
                found = back;
            }
        }
        Ok(found)
    }

    /// Bytes of all weights when everything goes that may.
    ///
    /// # Errors
    /// Those of [`Planner::plan`].
    pub fn least(&self) -> Result<JointPlan, PruneError> {
        let types = self.curves.plan(f64::INFINITY);
        match self.planner {
            Some(planner) => self.with(planner.most()?, RATIOS.end, types),
            None => self.plan(0.0, types),
        }
    }

    /// Everything that costs at most `price`, in nats per byte.
    fn at(&self, price: f64) -> Result<JointPlan, PruneError> {
        let types = self.curves.plan(price);
        let ratio = match self.planner {
            Some(planner) => {
                // What a weight of a layer takes then.
                let none = planner.plan(0.0)?;
                let all = types.bytes_after(self.model, &none);
                let rest = TypePlan::none(self.model).bytes_after(self.model, &none);
                let layers: usize = self.model.layers.iter().map(|layer| layer.bytes()).sum();
                let share = all as f64 / rest.max(1) as f64;
                let bytes = share * layers as f64 / self.model.layer_parameters().max(1) as f64;
                planner.ratio_at(price * bytes / WIDTHS_COST)?
            }
            None => 0.0,
        };
        self.plan(ratio, types)
    }

    /// All these types, and as few heads and channels less as make it small enough.
    fn by_widths(
        &self,
        types: TypePlan,
        small_enough: impl Fn(&JointPlan) -> bool,
    ) -> Result<Option<JointPlan>, PruneError> {
        let Some(planner) = self.planner else {
            return Ok(None);
        };
        let joint = |plan: &Plan, ratio| self.with(plan.clone(), ratio, types.clone());
        let found = planner
            .smallest_ratio(|plan| joint(plan, 0.0).is_ok_and(|plan| small_enough(&plan)))?;
        found.map(|(ratio, plan)| joint(&plan, ratio)).transpose()
    }

    fn plan(&self, ratio: f64, types: TypePlan) -> Result<JointPlan, PruneError> {
        let widths = match self.planner {
            Some(planner) => planner.plan(ratio)?,
            None => Plan::whole(self.model),
        };
        self.with(widths, ratio, types)
    }

    fn with(&self, widths: Plan, ratio: f64, types: TypePlan) -> Result<JointPlan, PruneError> {
        let types = types.over(&self.fixed);
        Ok(JointPlan {
            ratio,
            bytes: types.bytes_after(self.model, &widths),
            widths,
            types,
        })
    }
}
