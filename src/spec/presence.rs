//! Which instances are there, given the conditions that do not hold.
//!
//! The rule: an instance whose condition does not hold is left out, and with it every instance that cannot do without
//! it, which is one that reads it at a port it must have, a command that reads it, or a mixture whose members are all left out. An optional input, a member
//! of a mixture beside others, and a `needs` on it are simply dropped. What it reads itself stays.

use deepgen_contract::stage::{Ports, StageKind};

use super::expand::Instance;

/// Whether an instance is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It is.
    Here {
        /// Members that it has lost: their settings go with them.
        lost_members: Vec<String>,
    },
    /// It is not.
    LeftOut {
        /// Why, for people.
        reason: String,
    },
}

/// Decides for every instance; `unmet` says of each why its condition does not hold. Dropped edges are taken out.
pub fn decide(instances: &mut [Instance], kinds: &[Option<StageKind>], unmet: Vec<Option<String>>) -> Vec<Presence> {
    let mut all: Vec<Presence> = Vec::with_capacity(instances.len());
    for (at, unmet) in unmet.into_iter().enumerate() {
        let is_gone = |other: usize| matches!(all[other], Presence::LeftOut { .. });
        let instance = &instances[at];
        let ports = kinds[instance.table].map(StageKind::ports);
        let gone: Vec<String> =
            instance.inputs.iter().filter(|(_, other)| is_gone(**other)).map(|(port, _)| port.clone()).collect();
        let is_required = |port: &String| match ports {
            Some(Ports::Named(ports)) => ports.iter().any(|known| known.required && known.name == *port),
            Some(Ports::Members(_)) => gone.len() == instance.inputs.len(),
            Some(Ports::Free) | None => true,
        };
        let missed = gone.iter().find(|port| is_required(port)).map(|port| {
            let source = &instances[instance.inputs[port]].name;
            format!("its input `{port}` is `{source}`, which is left out")
        });
        if let Some(reason) = unmet.or(missed) {
            all.push(Presence::LeftOut { reason });
            continue;
        }
        let needs = instance.needs.iter().copied().filter(|other| !is_gone(*other)).collect();
        let instance = &mut instances[at];
        instance.needs = needs;
        instance.inputs.retain(|port, _| !gone.contains(port));
        all.push(Presence::Here { lost_members: gone });
    }
    all
}
