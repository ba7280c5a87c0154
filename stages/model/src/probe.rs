//! A look inside a forward pass: named tensors are recorded while a recorder is on, and nothing happens otherwise.
//!
//! For comparisons with a reference, layer by layer. Knows no module and no file; what is recorded is off the tape.

use std::cell::RefCell;

use burn::tensor::TensorData;

use crate::Tensor;
use crate::host::copy_out;

/// A tensor that passed a probe.
#[derive(Debug, Clone)]
pub struct Reading {
    /// Where it passed.
    pub place: String,
    /// Its value.
    pub data: TensorData,
}

thread_local! {
    static READINGS: RefCell<Option<Vec<Reading>>> = const { RefCell::new(None) };
}

/// Runs `forward` on this thread and returns its result and everything that passed a probe, in order.
pub fn record<R>(forward: impl FnOnce() -> R) -> (R, Vec<Reading>) {
    /// Switches the recorder off again even when `forward` panics.
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            READINGS.with(|readings| *readings.borrow_mut() = None);
        }
    }
    READINGS.with(|readings| *readings.borrow_mut() = Some(Vec::new()));
    let _off = Off;
    let result = forward();
    let readings = READINGS.with(|readings| readings.borrow_mut().take());
    (result, readings.unwrap_or_default())
}

/// Returns whether a recorder is on: worth asking where what to record must be made first.
pub fn is_on() -> bool {
    READINGS.with(|readings| readings.borrow().is_some())
}

/// Records `x` under the name that `place` gives, if a recorder is on.
pub fn tap<const D: usize>(place: impl FnOnce() -> String, x: &Tensor<D>) {
    READINGS.with(|readings| {
        if let Some(readings) = readings.borrow_mut().as_mut() {
            readings.push(Reading { place: place(), data: copy_out(x.clone()) });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn probes_record_in_order_and_only_inside_a_recording() {
        let x = Tensor::<1>::from_floats([1.0, 2.0], &Device::flex());
        tap(|| unreachable!("no recorder is on"), &x);
        let (result, readings) = record(|| {
            tap(|| "a".into(), &x);
            tap(|| "b".into(), &(x.clone() + 1.0));
            7
        });
        assert_eq!(result, 7);
        let places: Vec<&str> = readings.iter().map(|reading| reading.place.as_str()).collect();
        assert_eq!(places, ["a", "b"]);
        assert_eq!(readings[1].data.iter::<f32>().collect::<Vec<_>>(), [2.0, 3.0]);
        assert!(record(|| ()).1.is_empty());
    }
}
