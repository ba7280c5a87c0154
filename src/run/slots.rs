//! The slots of an executor: amounts such as `cpu` and `memory`, and things with an identity such as GPUs.
//!
//! A share of at most 1 of a thing lies on one of them; a larger one takes whole things. Knows what is free, not who
//! asks.

use std::collections::{BTreeMap, BTreeSet};

use litemap::LiteMap;

/// Shares are sums of decimal fractions; a third and two thirds must fit into one.
const TOLERANCE: f64 = 1e-9;

/// The slot whose things always have identities: jobs are told which GPUs are theirs.
pub const GPU: &str = "gpu";

/// What a job asks for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// Share of each slot.
    pub shares: LiteMap<String, f64>,
    /// Things that must be had, and no others, by slot.
    pub ids: BTreeMap<String, Vec<u32>>,
}

/// What a job has.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Held {
    amounts: Vec<(String, f64)>,
    things: Vec<(String, u32, f64)>,
}

impl Held {
    /// Returns the identities of what it has, by slot.
    pub fn ids(&self) -> BTreeMap<String, Vec<u32>> {
        let mut ids: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (slot, id, _) in &self.things {
            ids.entry(slot.clone()).or_default().push(*id);
        }
        ids
    }
}

/// What is free.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Slots {
    amounts: BTreeMap<String, f64>,
    things: BTreeMap<String, BTreeMap<u32, f64>>,
}

impl Slots {
    /// Returns slots of `capacity`, all free. A slot's things have the identities in `ids`, or count from 0; only slots
    /// in `ids` or in `named`, and `gpu`, have things at all.
    pub fn new(capacity: &BTreeMap<String, f64>, ids: &BTreeMap<String, Vec<u32>>, named: &BTreeSet<String>) -> Self {
        let mut slots = Self::default();
        for (name, &amount) in capacity {
            let has_things = name == GPU || ids.contains_key(name) || named.contains(name);
            if !has_things {
                slots.amounts.insert(name.clone(), amount);
                continue;
            }
            let things = match ids.get(name) {
                Some(ids) => ids.iter().map(|id| (*id, 1.0)).collect(),
                // The last of 1.5 GPUs is half a one.
                None => (0..amount.ceil().clamp(0.0, 4096.0) as u32)
                    .map(|id| (id, (amount - f64::from(id)).min(1.0)))
                    .collect(),
            };
            slots.things.insert(name.clone(), things);
        }
        slots
    }

    /// Returns what `request` would get now, or the slot that it has to wait for.
    ///
    /// # Errors
    /// The name of the first slot of which too little is free.
    pub fn fit(&self, request: &Request) -> Result<Held, String> {
        let mut held = Held::default();
        for (name, &share) in request.shares.iter().filter(|(_, share)| **share > 0.0) {
            let Some(things) = self.things.get(name) else {
                if share > self.amounts.get(name).copied().unwrap_or(0.0) + TOLERANCE {
                    return Err(name.clone());
                }
                held.amounts.push((name.clone(), share));
                continue;
            };
            let found = match request.ids.get(name) {
                Some(ids) => whole(things, ids.iter().copied(), ids.len()),
                None if share <= 1.0 + TOLERANCE => part(things, share.min(1.0)),
                None => whole(things, things.keys().copied(), (share - TOLERANCE).ceil() as usize),
            };
            let found = found.ok_or_else(|| name.clone())?;
            held.things.extend(found.into_iter().map(|(id, share)| (name.clone(), id, share)));
        }
        Ok(held)
    }

    /// Takes what [`Slots::fit`] found.
    pub fn take(&mut self, held: &Held) {
        self.change(held, -1.0);
    }

    /// Gives back what was taken.
    pub fn give(&mut self, held: &Held) {
        self.change(held, 1.0);
    }

    fn change(&mut self, held: &Held, sign: f64) {
        for (name, share) in &held.amounts {
            *self.amounts.entry(name.clone()).or_default() += sign * share;
        }
        for (name, id, share) in &held.things {
            *self.things.entry(name.clone()).or_default().entry(*id).or_default() += sign * share;
        }
    }
}

/// The fullest thing that still has room, so that whole ones stay free for those who need them.
fn part(things: &BTreeMap<u32, f64>, share: f64) -> Option<Vec<(u32, f64)>> {
    let room = things.iter().filter(|(_, free)| share <= **free + TOLERANCE);
    let fullest = room.min_by(|a, b| a.1.total_cmp(b.1).then(a.0.cmp(b.0)))?;
    Some(vec![(*fullest.0, share)])
}

fn whole(things: &BTreeMap<u32, f64>, ids: impl Iterator<Item = u32>, num: usize) -> Option<Vec<(u32, f64)>> {
    let is_free = |id: &u32| things.get(id).is_some_and(|free| *free >= 1.0 - TOLERANCE);
    let found: Vec<_> = ids.filter(is_free).take(num).map(|id| (id, 1.0)).collect();
    (found.len() == num).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(slot: &str, share: f64) -> Request {
        Request { shares: LiteMap::from_iter([(slot.to_owned(), share)]), ids: BTreeMap::new() }
    }

    fn gpus(slots: &mut Slots, share: f64) -> Option<Vec<u32>> {
        let held = slots.fit(&request(GPU, share)).ok()?;
        slots.take(&held);
        held.ids().remove(GPU)
    }

    fn four() -> Slots {
        let capacity = BTreeMap::from([(GPU.to_owned(), 4.0), ("memory".to_owned(), 16.0)]);
        Slots::new(&capacity, &BTreeMap::from([(GPU.to_owned(), vec![2, 3, 5, 7])]), &BTreeSet::new())
    }

    #[test]
    fn fractions_share_a_gpu_and_whole_ones_stay_free() {
        let mut slots = four();
        assert_eq!(gpus(&mut slots, 0.5), Some(vec![2]));
        assert_eq!(gpus(&mut slots, 0.75), Some(vec![3]));
        assert_eq!(gpus(&mut slots, 0.25), Some(vec![3]), "the fullest with room");
        assert_eq!(gpus(&mut slots, 2.0), Some(vec![5, 7]));
        assert_eq!(gpus(&mut slots, 1.0), None);
        assert_eq!(gpus(&mut slots, 0.5), Some(vec![2]));
        assert_eq!(gpus(&mut slots, 0.1), None);
    }

    #[test]
    fn a_node_waits_for_the_very_gpus_it_asks_for() {
        let mut slots = four();
        let mut wanted = request(GPU, 2.0);
        wanted.ids.insert(GPU.to_owned(), vec![3, 7]);
        let held = slots.fit(&wanted).unwrap();
        assert_eq!(held.ids()[GPU], [3, 7]);
        slots.take(&held);
        assert_eq!(slots.fit(&wanted), Err(GPU.to_owned()));
        slots.give(&held);
        assert_eq!(slots, four());
    }

    #[test]
    fn three_thirds_make_one_and_unknown_slots_have_nothing() {
        let capacity = BTreeMap::from([("cpu".to_owned(), 1.0)]);
        let mut slots = Slots::new(&capacity, &BTreeMap::new(), &BTreeSet::new());
        for _ in 0..3 {
            let held = slots.fit(&request("cpu", 1.0 / 3.0)).unwrap();
            slots.take(&held);
        }
        assert_eq!(slots.fit(&request("cpu", 0.1)), Err("cpu".to_owned()));
        assert_eq!(slots.fit(&request("tape", 1.0)), Err("tape".to_owned()));
    }
}
