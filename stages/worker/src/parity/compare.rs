//! Comparing with a case's expected tensors: every one of them must be compared.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;
use burn::tensor::{Gradients, TensorData};
use deepgen_model::Tensor;
use serde::Serialize;

use super::archive::{Archive, Array, Values};
use super::case::Case;
use super::error::{ParityError, ParityResult};
use crate::optimize::GradientSum;

/// What kind of quantity a tensor is: decides how far it may differ (the reference data's README states the limits).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Quantity {
    /// Ids, grids, positions, indices, masks.
    Exact,
    /// Schedules, advantages, log-probabilities.
    Schedule,
    /// What one model computes, and whole-model losses.
    Forward,
    /// What the whole model computes on the way.
    Whole,
    /// Gradients, and weights after many steps.
    Gradient,
    /// Generated pixels.
    Pixels,
    /// 8-bit pixels after normalisation: at most one level of the stated size, and hardly anywhere.
    Levels(f64),
}

/// Relative limits on other devices than the CPU are this much wider: they sum in another order and know no f64.
const DEVICE_FACTOR: f64 = 10.0;
/// A limit is never below this many times the noise between the reference's own f32 and f64 runs.
const NOISE_FACTOR: f64 = 4.0;
/// A gradient of smaller norm is rounding noise: zero in exact arithmetic.
const ROUNDING: f64 = 1e-6;
/// So is one that is smaller than this share of all the case's gradients together.
const ROUNDING_SHARE: f64 = 1e-7;
/// Largest mean difference of 8-bit pixels after normalisation.
const LEVEL_MEAN: f64 = 1e-3;

impl Quantity {
    fn limit(self) -> f64 {
        match self {
            Self::Exact => 0.0,
            Self::Schedule => 1e-5,
            Self::Forward => 1e-4,
            Self::Whole => 3e-4,
            Self::Gradient | Self::Pixels => 1e-3,
            Self::Levels(level) => level,
        }
    }
}

/// One compared tensor.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// File and name, or what else was compared.
    pub tensor: String,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// `|a - b| / |b|` in the 2-norm.
    pub relative: f64,
    /// Allowed relative difference; 0 for exact equality.
    pub limit: f64,
    /// Whether it holds.
    pub passed: bool,
    /// What a reader should know beside the numbers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// An expected file and what of it has been compared.
struct Expected {
    label: &'static str,
    archive: Archive,
    seen: BTreeSet<String>,
}

/// Compares with the expected tensors of one case.
pub struct Checker {
    expected: BTreeMap<&'static str, Expected>,
    limits: serde_json::Value,
    noise_floor: serde_json::Value,
    factor: f64,
    /// Norm below which a gradient is rounding noise.
    rounding: f64,
    lines: Vec<Line>,
}

/// The file of expected results.
pub const OUTPUTS: &str = "outputs.safetensors";
/// The file of expected gradients.
pub const GRADS: &str = "grads.safetensors";

impl Checker {
    /// Starts comparing with `files` of a case, each of which must be there and is covered whole in the end.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn new(case: &Case, files: &[&'static str], is_cpu: bool) -> ParityResult<Self> {
        let mut expected = BTreeMap::new();
        for &file in files {
            let label = if file == GRADS { "grad " } else { "" };
            expected.insert(file, Expected { label, archive: case.archive(file)?, seen: BTreeSet::new() });
        }
        let norm = expected.get(GRADS).map_or(0.0, |gradients| gradients.archive.norm());
        Ok(Self {
            expected,
            limits: ["tolerances", "tolerance"]
                .iter()
                .map(|key| &case.config.value[*key])
                .find(|own| !own.is_null())
                .cloned()
                .unwrap_or_default(),
            noise_floor: case.config.value["noise_floor"].clone(),
            factor: if is_cpu { 1.0 } else { DEVICE_FACTOR },
            rounding: ROUNDING.max(ROUNDING_SHARE * norm),
            lines: Vec::new(),
        })
    }

    /// Returns the expected results.
    ///
    /// # Panics
    /// When the checker was not made for them.
    pub fn outputs(&self) -> &Archive {
        &self.expected[OUTPUTS].archive
    }

    /// Compares a tensor of the expected results.
    ///
    /// # Errors
    /// When there is no such expected tensor.
    pub fn tensor<const D: usize>(&mut self, name: &str, ours: Tensor<D>, quantity: Quantity) -> ParityResult<()> {
        self.data(OUTPUTS, name, &ours.into_data(), quantity)
    }

    /// Compares a scalar of the expected results.
    ///
    /// # Errors
    /// As [`Checker::tensor`].
    pub fn scalar(&mut self, name: &str, ours: Tensor<1>, quantity: Quantity) -> ParityResult<()> {
        self.floats(OUTPUTS, name, ours.into_data().iter::<f32>().collect(), &[], quantity)
    }

    /// Compares a tensor of `file`.
    ///
    /// # Errors
    /// As [`Checker::tensor`].
    pub fn data(&mut self, file: &str, name: &str, ours: &TensorData, quantity: Quantity) -> ParityResult<()> {
        self.floats(file, name, ours.iter::<f32>().collect(), &ours.shape().to_vec(), quantity)
    }

    /// Compares floats of a shape with a tensor of `file`.
    ///
    /// # Errors
    /// As [`Checker::tensor`].
    pub fn floats(
        &mut self,
        file: &str,
        name: &str,
        ours: Vec<f32>,
        shape: &[usize],
        quantity: Quantity,
    ) -> ParityResult<()> {
        let (label, theirs) = self.take(file, name)?;
        let ours = Array { shape: shape.to_vec(), values: Values::Float(ours) };
        let line = self.compare(format!("{label}{name}"), name, &ours, &theirs, quantity);
        self.lines.push(line);
        Ok(())
    }

    /// Compares integers with a tensor of the expected results; they must be equal.
    ///
    /// # Errors
    /// As [`Checker::tensor`].
    pub fn integers(&mut self, name: &str, ours: Vec<i64>, shape: &[usize]) -> ParityResult<()> {
        let (label, theirs) = self.take(OUTPUTS, name)?;
        let ours = Array { shape: shape.to_vec(), values: Values::Int(ours) };
        let line = self.compare(format!("{label}{name}"), name, &ours, &theirs, Quantity::Exact);
        self.lines.push(line);
        Ok(())
    }

    /// Compares floats with values that no expected file holds, such as a number in the settings.
    pub fn extra(&mut self, name: &str, ours: &[f32], theirs: &[f32], quantity: Quantity) {
        let array = |values: &[f32]| Array { shape: vec![values.len()], values: Values::Float(values.to_vec()) };
        let line = self.compare(name.into(), name, &array(ours), &array(theirs), quantity);
        self.lines.push(line);
    }

    /// Adds what a reader should know to the last comparison.
    pub fn note(&mut self, note: &str) {
        if let Some(line) = self.lines.last_mut().filter(|line| line.note.is_empty()) {
            line.note = note.into();
        }
    }

    /// Records a claim that is true or false.
    pub fn claim(&mut self, name: &str, holds: bool, note: String) {
        let difference = if holds { 0.0 } else { f64::INFINITY };
        self.lines.push(Line {
            tensor: name.into(),
            max_abs: difference,
            relative: difference,
            limit: 0.0,
            passed: holds,
            note,
        });
    }

    /// Compares every gradient of the expected ones that belongs to a parameter of `module`; `rename` turns the reference's
    /// name into ours, and `None` leaves it to another comparison.
    ///
    /// # Errors
    /// As [`Checker::tensor`].
    pub fn gradients<M: Module>(
        &mut self,
        module: &M,
        gradients: Gradients,
        rename: impl Fn(&str) -> Option<String>,
    ) -> ParityResult<GradientSum> {
        let mut sum = GradientSum::default();
        sum.add(module, gradients, 1.0);
        let names: Vec<String> = self.expected[GRADS].archive.names().map(str::to_owned).collect();
        for theirs in names {
            let Some(ours) = rename(&theirs) else { continue };
            let Some(gradient) = sum.get(&ours) else {
                self.take(GRADS, &theirs)?;
                self.claim(&format!("grad {theirs}"), false, format!("no gradient reached {ours}"));
                continue;
            };
            let values = gradient.into_data().iter::<f32>().collect();
            // Gradients are vectors here; the shape of a parameter was checked when it was loaded.
            let shape = self.expected[GRADS].archive.get(&theirs)?.shape.clone();
            self.floats(GRADS, &theirs, values, &shape, Quantity::Gradient)?;
        }
        Ok(sum)
    }

    fn take(&mut self, file: &str, name: &str) -> ParityResult<(&'static str, Array)> {
        let Some(expected) = self.expected.get_mut(file) else {
            return Err(ParityError::Unsupported(format!("the case does not list {file} among its expected files")));
        };
        let array = expected.archive.get(name)?.clone();
        expected.seen.insert(name.to_owned());
        Ok((expected.label, array))
    }

    fn compare(&self, label: String, name: &str, ours: &Array, theirs: &Array, quantity: Quantity) -> Line {
        let difference = Difference::of(&ours.values, &theirs.values);
        let limit = self.limit(name, quantity);
        let shapes_agree = squeezed(&ours.shape) == squeezed(&theirs.shape) || ours.shape == theirs.shape;
        let mut note = String::new();
        let mut passed = match quantity {
            Quantity::Exact => difference.max_abs == 0.0,
            Quantity::Levels(level) => difference.max_abs <= level && difference.mean_abs <= LEVEL_MEAN,
            _ => difference.relative() <= limit,
        };
        if quantity == Quantity::Gradient && difference.size < self.rounding {
            // Softmax does not see a bias that all keys share, for example.
            passed = difference.ours < self.rounding;
            note = "rounding noise: zero in exact arithmetic".into();
        }
        if difference.count_differs || !shapes_agree {
            passed = false;
            note = format!("shape {:?}, expected {:?}", ours.shape, theirs.shape);
        }
        Line { tensor: label, max_abs: difference.max_abs, relative: difference.relative(), limit, passed, note }
    }

    /// Returns the case's own limit for the tensor if it states one, else the quantity's.
    fn limit(&self, name: &str, quantity: Quantity) -> f64 {
        if let Some(own) = self.limits.as_f64().or_else(|| self.limits[name].as_f64()) {
            return own;
        }
        match quantity {
            Quantity::Exact | Quantity::Levels(_) => quantity.limit(),
            _ => (quantity.limit() * self.factor).max(NOISE_FACTOR * self.noise_floor[name].as_f64().unwrap_or(0.0)),
        }
    }

    /// Returns the lines.
    ///
    /// # Errors
    /// When an expected tensor was not compared.
    pub fn finish(self) -> ParityResult<Vec<Line>> {
        let missed = self.expected.iter().flat_map(|(file, expected)| {
            let missed = expected.archive.names().filter(|name| !expected.seen.contains(*name));
            missed.map(move |name| format!("{file}:{name}"))
        });
        let missed: Vec<String> = missed.collect();
        if missed.is_empty() { Ok(self.lines) } else { Err(ParityError::NotCompared(missed)) }
    }
}

/// Axes of size 1 apart.
fn squeezed(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|&size| size != 1).collect()
}

/// How two lists of numbers differ.
struct Difference {
    max_abs: f64,
    mean_abs: f64,
    distance: f64,
    /// Norm of the reference.
    size: f64,
    /// Norm of ours.
    ours: f64,
    count_differs: bool,
}

impl Difference {
    fn of(ours: &Values, theirs: &Values) -> Self {
        let pairs: (Vec<f64>, Vec<f64>) = (wide(ours), wide(theirs));
        let mut difference = Self {
            max_abs: 0.0,
            mean_abs: 0.0,
            distance: 0.0,
            size: 0.0,
            ours: 0.0,
            count_differs: pairs.0.len() != pairs.1.len(),
        };
        for (&a, &b) in pairs.0.iter().zip(&pairs.1) {
            // Equal infinities differ by nothing; NaN anywhere must fail.
            let gap = if a == b { 0.0 } else { (a - b).abs() };
            let gap = if gap.is_nan() { f64::INFINITY } else { gap };
            difference.max_abs = difference.max_abs.max(gap);
            difference.mean_abs += gap / pairs.0.len() as f64;
            difference.distance += gap * gap;
            difference.size += b * b;
            difference.ours += a * a;
        }
        for sum in [&mut difference.distance, &mut difference.size, &mut difference.ours] {
            *sum = sum.sqrt();
        }
        if difference.count_differs {
            (difference.max_abs, difference.distance) = (f64::INFINITY, f64::INFINITY);
        }
        difference
    }

    /// Of a reference that is zero the distance itself counts.
    fn relative(&self) -> f64 {
        if self.size > 0.0 { self.distance / self.size } else { self.distance }
    }
}

fn wide(values: &Values) -> Vec<f64> {
    match values {
        Values::Float(values) => values.iter().map(|&value| f64::from(value)).collect(),
        Values::Int(values) => values.iter().map(|&value| value as f64).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(values: &[f32]) -> Values {
        Values::Float(values.to_vec())
    }

    #[test]
    fn differences_are_measured_over_the_whole_tensor() {
        let difference = Difference::of(&floats(&[3.0, 4.0, 0.5]), &floats(&[3.0, 4.0, 0.0]));
        assert_eq!(difference.max_abs, 0.5);
        assert!((difference.relative() - 0.1).abs() < 1e-12);
    }

    #[test]
    fn nan_and_missing_values_are_infinitely_far_off() {
        assert_eq!(Difference::of(&floats(&[f32::NAN]), &floats(&[1.0])).relative(), f64::INFINITY);
        assert_eq!(Difference::of(&floats(&[1.0]), &floats(&[1.0, 1.0])).max_abs, f64::INFINITY);
        assert_eq!(Difference::of(&floats(&[f32::INFINITY]), &floats(&[f32::INFINITY])).max_abs, 0.0);
    }

    #[test]
    fn integers_beyond_f32_are_compared_exactly() {
        let big = |value: i64| Values::Int(vec![value]);
        assert_eq!(Difference::of(&big(16_777_217), &big(16_777_216)).max_abs, 1.0);
    }
}
