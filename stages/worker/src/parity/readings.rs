//! What probes recorded, by place.

use deepgen_model::probe::Reading;

/// The readings of one forward pass.
pub struct Readings(Vec<Reading>);

impl Readings {
    /// Takes over a recording.
    pub fn new(readings: Vec<Reading>) -> Self {
        Self(readings)
    }

    /// Returns these readings and then `others`.
    pub fn followed_by(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// Returns the readings of a place, in order.
    pub fn of(&self, place: &str) -> Vec<&Reading> {
        self.0.iter().filter(|reading| reading.place == place).collect()
    }

    /// Returns the only reading of a place, or the last one.
    pub fn last(&self, place: &str) -> Option<&Reading> {
        self.0.iter().rev().find(|reading| reading.place == place)
    }

    /// Returns the samples that passed a place, in order, each with its shape: readings `[c, h, w]` one by one, and batches
    /// `[b, c, h, w]` cut into their rows.
    pub fn samples(&self, place: &str) -> Vec<(Vec<usize>, Vec<f32>)> {
        let mut samples = Vec::new();
        for reading in self.of(place) {
            let shape = reading.data.shape().to_vec();
            let values: Vec<f32> = reading.data.iter::<f32>().collect();
            let own = if shape.len() == 4 { &shape[1..] } else { &shape[..] };
            let size = own.iter().product::<usize>().max(1);
            samples.extend(values.chunks(size).map(|sample| (own.to_vec(), sample.to_vec())));
        }
        samples
    }

    /// Puts the rows of every reading `[1, rows, width]` from the order `from` of its cells into the order `to`; a cell may
    /// be several rows.
    pub fn reorder(mut self, from: &[usize], to: &[usize]) -> Self {
        let mut place_of = vec![0; from.len()];
        for (place, &cell) in from.iter().enumerate() {
            place_of[cell] = place;
        }
        for reading in &mut self.0 {
            let values: Vec<f32> = reading.data.iter::<f32>().collect();
            let size = values.len() / from.len();
            let moved: Vec<f32> =
                to.iter().flat_map(|&cell| values[place_of[cell] * size..][..size].iter().copied()).collect();
            reading.data = burn::tensor::TensorData::new(moved, reading.data.shape().to_vec());
        }
        self
    }

    /// Returns the places of the first of several recordings.
    pub fn places(all: &[Self]) -> Vec<String> {
        all.first().map(|one| one.0.iter().map(|reading| reading.place.clone()).collect()).unwrap_or_default()
    }

    /// Returns a place's values of all recordings one after another, and the width of a row.
    pub fn joined(all: &[Self], place: &str) -> (Vec<f32>, usize) {
        let readings: Vec<&Reading> = all.iter().filter_map(|one| one.last(place)).collect();
        let width = readings.first().and_then(|reading| reading.data.shape().to_vec().last().copied()).unwrap_or(1);
        (readings.iter().flat_map(|reading| reading.data.iter::<f32>()).collect(), width)
    }
}
