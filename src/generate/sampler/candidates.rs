//! The tokens that are still in the choice.

use std::cmp::Ordering;

/// A token, its logit, and its probability among the candidates, where that is up to date.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub token: u32,
    pub logit: f32,
    pub p: f32,
}

/// The most likely first; of equals the one with the smaller number, so that the order is fixed.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// The tokens that are still in the choice: never none.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates {
    items: Vec<Candidate>,
    /// Whether the item at place i is token i.
    whole: bool,
    /// Whether probabilities are those of the logits.
    fresh: bool,
}

impl Candidates {
    /// Takes in all tokens, or those that are allowed.
    pub fn fill(&mut self, logits: &[f32], allowed: Option<&[u32]>) {
        let candidate = |token: u32| Candidate {
            token,
            logit: logits[token as usize],
            p: 0.0,
        };
        self.items.clear();
        match allowed {
            None => self.items.extend((0..logits.len() as u32).map(candidate)),
            Some(allowed) => self.items.extend(allowed.iter().copied().map(candidate)),
        }
        self.whole = allowed.is_none();
        self.fresh = false;
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// The candidates, without regard to their probabilities.
    pub fn items(&self) -> &[Candidate] {
        &self.items
    }

    /// Changes the logits of some tokens, which must be in the order of their numbers. Those that are no candidates are left out.
    pub fn change<T>(&mut self, tokens: &[(u32, T)], change: impl Fn(&mut f32, &T)) {
        self.fresh = false;
        if self.whole {
            for (token, by) in tokens {
                if let Some(item) = self.items.get_mut(*token as usize) {
                    change(&mut item.logit, by);
                }
            }
            return;
        }
        for item in &mut self.items {
            if let Ok(at) = tokens.binary_search_by_key(&item.token, |(token, _)| *token) {
                change(&mut item.logit, &tokens[at].1);
            }
        }
    }

    /// Changes all logits, in a way that keeps their order.
    pub fn scale(&mut self, change: impl Fn(f32) -> f32) {
        for item in &mut self.items {
            item.logit = change(item.logit);
        }
        self.fresh = false;
    }

    /// The most likely token; of equals the one with the smallest number.
    pub fn best(&self) -> Candidate {
        let best = self.items.iter().min_by(|a, b| by_rank(a, b));
        *best.expect("there are candidates")
    }

    /// The candidates with their probabilities.
    pub fn probable(&mut self) -> &[Candidate] {
        if !self.fresh {
            let best = self.best().logit;
            let mut total = 0.0f64;
            for item in &mut self.items {
                item.p = weight(item.logit, best);
                total += f64::from(item.p);
            }
            for item in &mut self.items {
                item.p = (f64::from(item.p) / total) as f32;
            }
            self.fresh = true;
        }
        &self.items
    }

    /// The k most likely, in order.
    pub fn keep_best(&mut self, k: usize) {
        let k = k.max(1);
        if k < self.items.len() {
            self.items.select_nth_unstable_by(k - 1, by_rank);
            self.cut(k);
        }
        self.items.sort_unstable_by(by_rank);
        self.whole = false;
    }

    /// The most likely tokens that together have this probability, in order: few of many need be sorted for it.
    pub fn keep_probability(&mut self, share: f32) {
        self.probable();
        self.whole = false;
        let mut sorted = 0;
        let mut sum = 0.0f64;
        while sorted < self.items.len() {
            let more = (sorted * 4).max(256).min(self.items.len());
            let rest = &mut self.items[sorted..];
            if more - sorted < rest.len() {
                rest.select_nth_unstable_by(more - sorted, by_rank);
            }
            self.items[sorted..more].sort_unstable_by(by_rank);
            for at in sorted..more {
                sum += f64::from(self.items[at].p);
                if sum >= f64::from(share) {
                    self.cut(at + 1);
                    return;
                }
            }
            sorted = more;
        }
    }

    /// The candidates that are told to stay; the best one stays where none would.
    pub fn retain(&mut self, stays: impl Fn(&Candidate) -> bool) {
        let best = self.best();
        let before = self.items.len();
        self.items.retain(stays);
        if self.items.is_empty() {
            self.items.push(best);
        }
        if self.items.len() < before {
            self.whole = false;
            self.fresh = false;
        }
    }

    /// The first in an order of one's own, as many as together have this probability.
    pub fn keep_first(&mut self, share: f32, key: impl Fn(&Candidate) -> f32) {
        self.probable();
        self.items
            .sort_by(|a, b| key(a).total_cmp(&key(b)).then(by_rank(a, b)));
        self.whole = false;
        let mut sum = 0.0f64;
        let enough = self.items.iter().position(|item| {
            sum += f64::from(item.p);
            sum >= f64::from(share)
        });
        if let Some(last) = enough {
            self.cut(last + 1);
        }
    }

    fn cut(&mut self, len: usize) {
        if len < self.items.len() {
            self.items.truncate(len);
            self.whole = false;
            self.fresh = false;
        }
    }

    /// One of them by its probability; `uniform` is from [0, 1).
    pub fn draw(&mut self, uniform: f64) -> Candidate {
        let items = self.probable();
        let total: f64 = items.iter().map(|item| f64::from(item.p)).sum();
        let mut left = uniform * total;
        for item in items {
            left -= f64::from(item.p);
            if left < 0.0 {
                return *item;
            }
        }
        self.best()
    }
}

/// e to the distance from the best logit. Where everything is −∞ but the best, or all are equal infinities, the difference must not
/// be NaN.
pub(super) fn weight(logit: f32, best: f32) -> f32 {
    match logit == best {
        true => 1.0,
        false => (logit - best).exp(),
    }
}
