//! Which parameters train: decided here and nowhere else, by patterns over parameter names.
//!
//! A pattern is a name in which `*` stands for any run of characters: `bridge.*`, `dit.*`, `vlm.*.lora_*`. A pattern that
//! matches nothing is an error, because a misspelt one would silently train less. Buffers (the DiT's position table)
//! never train. Knows no optimiser and no stage.

use burn::module::Module;

use crate::weights::{for_each_param, is_buffer, set_trainable};

/// Why the trainable set could not be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TrainableError {
    /// A pattern selects no parameter.
    #[error("the pattern {pattern:?} matches no parameter; names begin with {beginnings}")]
    NoMatch {
        /// The pattern.
        pattern: String,
        /// First parts of the names there are.
        beginnings: String,
    },
}

/// The resolved set: which parameters train, and how many elements that is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trainable {
    /// Names of the parameters that train, in the order of the module's fields.
    pub names: Vec<String>,
    /// Their elements.
    pub num_elements: u64,
}

/// Makes exactly the parameters that a pattern matches collect gradients, and freezes the others.
///
/// # Errors
/// When a pattern matches no parameter that can train.
pub fn select<M: Module>(module: M, patterns: &[String]) -> Result<(M, Trainable), TrainableError> {
    let mut trainable = Trainable::default();
    let mut has_matched = vec![false; patterns.len()];
    let mut beginnings: Vec<String> = Vec::new();
    for_each_param(&module, |name, param| {
        let beginning = name.split('.').next().unwrap_or(name);
        if !beginnings.iter().any(|known| known == beginning) {
            beginnings.push(beginning.into());
        }
        if is_buffer(name) {
            return;
        }
        let mut is_trained = false;
        for (matched, pattern) in has_matched.iter_mut().zip(patterns) {
            if matches(pattern, name) {
                (*matched, is_trained) = (true, true);
            }
        }
        if is_trained {
            trainable.names.push(name.into());
            trainable.num_elements += param.shape().iter().product::<usize>() as u64;
        }
    });
    if let Some((_, pattern)) = has_matched.iter().zip(patterns).find(|(matched, _)| !**matched) {
        let beginnings = beginnings.join(", ");
        return Err(TrainableError::NoMatch { pattern: pattern.clone(), beginnings });
    }
    let module = set_trainable(module, |name| patterns.iter().any(|pattern| matches(pattern, name)));
    Ok((module, trainable))
}

/// Returns whether `name` fits `pattern`, in which `*` stands for any run of characters, dots included.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        // The earliest place leaves most room for the parts to come, so it finds a match if there is one.
        let Some(start) = rest.find(part) else { return false };
        rest = &rest[start + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::init::{Fill, Init};
    use crate::nn::Linear;

    #[derive(Module, Debug)]
    struct Pair {
        bridge: Linear,
        dit: Linear,
    }

    fn pair() -> Pair {
        let init = Init::new(1, &Device::flex().autodiff());
        let linear = |name: &str| Linear::new(&init.at(name), 2, 3, Fill::Ones, Some(Fill::Zeros));
        Pair { bridge: linear("bridge"), dit: linear("dit") }
    }

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        let adapter = "vlm.model.layers.0.self_attn.q_proj.lora_A.default.weight";
        for (pattern, name, expected) in [
            ("bridge.*", "bridge.projector_1.weight", true),
            ("bridge.*", "vlm.bridge.weight", false),
            ("vlm.*.lora_*", adapter, true),
            ("vlm.*.lora_*", "vlm.model.norm.weight", false),
            ("*", "dit.proj_out.bias", true),
            ("dit.*.bias", "dit.proj_out.bias", true),
            ("dit.*.bias", "dit.proj_out.weight", false),
            ("dit.proj_out.bias", "dit.proj_out.bias", true),
            ("dit.proj_out", "dit.proj_out.bias", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} on {name}");
        }
    }

    #[test]
    fn only_matched_parameters_collect_gradients() {
        let (pair, trainable) = select(pair(), &["bridge.*".into(), "dit.bias".into()]).unwrap();
        assert_eq!(trainable.names, ["bridge.weight", "bridge.bias", "dit.bias"]);
        assert_eq!(trainable.num_elements, 6 + 3 + 3);
        let mut collects = Vec::new();
        for_each_param(&pair, |name, param| {
            if param.is_trainable() {
                collects.push(name.to_string());
            }
        });
        assert_eq!(collects, trainable.names);
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_an_error_that_names_what_there_is() {
        let error = select(pair(), &["brigde.*".into()]).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("brigde") && message.contains("bridge, dit"), "{message}");
    }
}
