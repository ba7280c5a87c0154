//! Which nodes a command means: `--only`, `--from`, `--to` and `--force`, and names with `*` and `?`.
//!
//! Pure: a plan goes in and a smaller plan comes out. Knows no disk and no run.

use std::collections::{BTreeMap, BTreeSet};

use deepgen_contract::id::NodeName;

use crate::cli::Wrong;
use crate::plan::{Plan, Reason, Verdict};
use crate::spec::nearest;

/// Names shown when a pattern matches nothing and no name is near.
const NUM_SHOWN: usize = 8;

/// A choice among the nodes of a plan. NODE is a node (`images`: all of its instances), an instance
/// (`images[geneval]`), or a pattern with `*` and `?` (`scores[*,handoff-2]`).
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Which nodes (NODE: sft, images[geneval], 'scores[*]'; may be repeated)")]
pub struct Selection {
    /// These nodes and nothing else: what they need must be sealed already
    #[arg(long, value_name = "NODE", conflicts_with_all = ["from", "to"])]
    pub only: Vec<String>,
    /// These nodes and all that follow from them; what these need besides must be sealed already
    #[arg(long, value_name = "NODE")]
    pub from: Vec<String>,
    /// These nodes and all that they need; with --from only what lies between
    #[arg(long, value_name = "NODE")]
    pub to: Vec<String>,
    /// Compute these nodes again from the start, though their results are sealed. What was made from the old results
    /// stays; the run says when a new result differs
    #[arg(long, value_name = "NODE")]
    pub force: Vec<String>,
}

/// A plan after a choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    /// Chosen nodes, and the sealed ones that they read.
    pub plan: Plan,
    /// Nodes to compute again.
    pub forced: BTreeSet<NodeName>,
}

impl Selection {
    /// Returns the part of `plan` that was chosen.
    ///
    /// # Errors
    /// When a name matches nothing, or a chosen node reads one that is neither sealed nor chosen.
    pub fn apply(&self, plan: Plan) -> Result<Selected, Wrong> {
        let is_all = [&self.only, &self.from, &self.to, &self.force].iter().all(|patterns| patterns.is_empty());
        if is_all && !plan.nodes.is_empty() {
            return Ok(Selected { plan, forced: BTreeSet::new() });
        }
        let names: Vec<&str> = plan.nodes.iter().map(|planned| planned.node.name.0.as_str()).collect();
        let index: BTreeMap<&str, usize> = names.iter().enumerate().map(|(at, name)| (*name, at)).collect();
        let inputs: Vec<Vec<usize>> = plan
            .nodes
            .iter()
            .map(|planned| {
                let before = planned.node.inputs.values().chain(&planned.node.needs);
                before.filter_map(|name| index.get(name.0.as_str()).copied()).collect()
            })
            .collect();
        let matching = |patterns: &[String]| matching_all(patterns, &names);

        let mut chosen: BTreeSet<usize> = match self.only.is_empty() {
            true => (0..names.len()).collect(),
            false => matching(&self.only)?,
        };
        if !self.from.is_empty() {
            let mut after = matching(&self.from)?;
            // Inputs stand before their readers, so one pass reaches all that follow.
            for (at, inputs) in inputs.iter().enumerate() {
                if inputs.iter().any(|input| after.contains(input)) {
                    after.insert(at);
                }
            }
            chosen.retain(|at| after.contains(at));
        }
        if !self.to.is_empty() {
            let mut before = matching(&self.to)?;
            for (at, inputs) in inputs.iter().enumerate().rev() {
                if before.contains(&at) {
                    before.extend(inputs);
                }
            }
            chosen.retain(|at| before.contains(at));
        }
        let forced = matching(&self.force)?;
        if let Some(&outside) = forced.iter().find(|at| !chosen.contains(at)) {
            return Err(Wrong(format!("--force names `{}`, which is not among the chosen nodes", names[outside])));
        }
        let accepted = forced.iter().map(|&at| &plan.nodes[at]).find(|planned| planned.stands_for.is_some());
        if let Some(planned) = accepted {
            let what = format!("--force names `{}`, which uses the result that was accepted for it", planned.node.name);
            return Err(Wrong(format!("{what}: take that back first with `deepgen accept --revoke`")));
        }
        if chosen.is_empty() {
            return Err(Wrong("no node lies between those of --from and those of --to".to_owned()));
        }
        self.cut(&plan, &chosen, &forced, &inputs)
    }

    /// Cuts the plan to the chosen nodes and the sealed ones that they read.
    fn cut(
        &self,
        plan: &Plan,
        chosen: &BTreeSet<usize>,
        forced: &BTreeSet<usize>,
        inputs: &[Vec<usize>],
    ) -> Result<Selected, Wrong> {
        let mut kept = chosen.clone();
        let mut problems = Vec::new();
        for &at in chosen {
            for &input in inputs[at].iter().filter(|input| !chosen.contains(input)) {
                kept.insert(input);
                let (reader, read) = (&plan.nodes[at], &plan.nodes[input]);
                if reader.verdict != Verdict::Cached && read.verdict != Verdict::Cached {
                    let (reader, read) = (&reader.node.name, &read.node.name);
                    problems.push(format!("`{reader}` needs `{read}`, which is neither sealed nor chosen"));
                }
            }
        }
        if !problems.is_empty() {
            problems.dedup();
            let more = if problems.len() > NUM_SHOWN {
                format!("; and {} more", problems.len() - NUM_SHOWN)
            } else {
                String::new()
            };
            problems.truncate(NUM_SHOWN);
            let remedy = "choose it too, or use --to, which runs all that a node needs";
            return Err(Wrong(format!("{}{more}: {remedy}", problems.join("; "))));
        }
        let mut nodes: Vec<_> = kept.iter().map(|&at| plan.nodes[at].clone()).collect();
        let forced: BTreeSet<NodeName> = forced.iter().map(|&at| plan.nodes[at].node.name.clone()).collect();
        for planned in &mut nodes {
            if planned.verdict == Verdict::Cached && forced.contains(&planned.node.name) {
                planned.verdict = Verdict::Run(Reason::Forced);
            }
        }
        Ok(Selected { plan: Plan { nodes }, forced })
    }
}

/// Returns the places of all names that one of the patterns means.
fn matching_all(patterns: &[String], names: &[&str]) -> Result<BTreeSet<usize>, Wrong> {
    let mut all = BTreeSet::new();
    for pattern in patterns {
        all.extend(matching(pattern, names)?);
    }
    Ok(all)
}

/// Returns the places of the names that `pattern` means: that very name, else the instances of that node, else those
/// that match its `*` and `?`.
///
/// # Errors
/// When it means none, with the nearest name.
pub fn matching(pattern: &str, names: &[&str]) -> Result<Vec<usize>, Wrong> {
    if let Some(at) = names.iter().position(|name| *name == pattern) {
        return Ok(vec![at]);
    }
    let places = |is: &dyn Fn(&str) -> bool| -> Vec<usize> {
        names.iter().enumerate().filter(|(_, name)| is(name)).map(|(at, _)| at).collect()
    };
    let mut found = places(&|name| base(name) == pattern);
    if found.is_empty() && pattern.contains(['*', '?']) {
        found = places(&|name| is_match(pattern, name));
    }
    if !found.is_empty() {
        return Ok(found);
    }
    let mut known: Vec<&str> = names.to_vec();
    known.extend(names.iter().map(|name| base(name)));
    let hint = match nearest(pattern, &known) {
        Some(near) => format!(": did you mean `{near}`?"),
        None => {
            let shown: BTreeSet<&str> = names.iter().map(|name| base(name)).collect();
            let list: Vec<&str> = shown.iter().take(NUM_SHOWN).copied().collect();
            let more = if shown.len() > NUM_SHOWN { ", ..." } else { "" };
            format!("; there are {}{more}", list.join(", "))
        }
    };
    let what = if pattern.contains(['*', '?']) { "no node matches" } else { "there is no node" };
    Err(Wrong(format!("{what} `{pattern}`{hint}")))
}

/// Returns the node of an instance: `images` of `images[geneval]` and of `images[geneval]@variant`.
fn base(name: &str) -> &str {
    name.split(['[', '@']).next().unwrap_or(name)
}

/// Matches the whole of `text` against a pattern in which `*` stands for any text and `?` for one character.
fn is_match(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where to go on after a `*` that took too little: the place behind it, and the text it has taken so far.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                p += 1;
                star = Some((p, t));
            }
            Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((behind, taken)) => {
                    (p, t) = (behind, taken + 1);
                    star = Some((behind, taken + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 6] =
        ["base", "sft", "images[geneval,sft]", "images[dpg,sft]", "scores[geneval,sft]", "sft@w/o SCB"];

    fn found(pattern: &str) -> Vec<&'static str> {
        matching(pattern, &NAMES).unwrap().into_iter().map(|at| NAMES[at]).collect()
    }

    #[test]
    fn a_name_means_itself_a_node_its_instances_and_a_pattern_what_it_matches() {
        assert_eq!(found("sft"), ["sft"]);
        assert_eq!(found("images"), ["images[geneval,sft]", "images[dpg,sft]"]);
        assert_eq!(found("images[dpg,sft]"), ["images[dpg,sft]"]);
        assert_eq!(found("*[geneval,*"), ["images[geneval,sft]", "scores[geneval,sft]"]);
        assert_eq!(found("sft*"), ["sft", "sft@w/o SCB"]);
        assert_eq!(found("?ase"), ["base"]);
    }

    #[test]
    fn an_unknown_name_gets_the_nearest_or_a_list() {
        assert!(matching("stf", &NAMES).unwrap_err().0.ends_with("did you mean `sft`?"));
        assert!(matching("image", &NAMES).unwrap_err().0.contains("did you mean `images`?"));
        let message = matching("qqqqqqqq", &NAMES).unwrap_err().0;
        assert_eq!(message, "there is no node `qqqqqqqq`; there are base, images, scores, sft");
    }

    #[test]
    fn stars_may_stand_anywhere() {
        for (pattern, text) in [("*", ""), ("a*b*c", "aXbYbZc"), ("*c", "abc"), ("a?c", "abc"), ("**", "x")] {
            assert!(is_match(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("a*b", "abc"), ("?", ""), ("a", "ab"), ("a*?", "a")] {
            assert!(!is_match(pattern, text), "{pattern} {text}");
        }
    }
}
