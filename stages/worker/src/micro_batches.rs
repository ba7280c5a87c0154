//! Micro-batches of a mixture, prepared ahead by other threads, with their flow-matching losses.
//!
//! Knows mixture and model, no optimiser. A micro-batch is a function of the seed and its number, so that any of them can be
//! read again.

use std::ops::Range;
use std::sync::Arc;

use deepgen_contract::flops::{SampleSize, Trained, training_step};
use deepgen_contract::model::{ModelSpec, Padding};
use deepgen_data::batch::{Batch, LoadError, Loader};
use deepgen_data::prefetch::Prefetch;
use deepgen_data::resize::Pixels;
use deepgen_data::stream::Shard;
use deepgen_model::deepgen::DeepGen;
use deepgen_model::random::{Rows, with_dropout};

use crate::error::{JobError, JobResult, OrFail};
use crate::flow_step::{FlowStep, Part, Sigmas, loss_name};
use crate::job::JobContext;
use crate::learner::{Loss, Losses};
use crate::suspects;

/// The micro-batches of a job.
pub struct MicroBatches {
    /// Reads them.
    pub loader: Arc<Loader>,
    /// Their losses.
    pub flow: FlowStep,
    /// Micro-batches prepared ahead.
    depth: usize,
    /// Threads that prepare them: the micro-batches do not depend on it.
    threads: usize,
    seed: u64,
    /// Steps of the job that come before the first micro-batch.
    steps_before: u64,
    /// What operations are counted of.
    spec: ModelSpec,
    trained: Trained,
    /// What is prepared, and the number of its next one.
    prefetch: Option<(u64, Prefetch<Result<Batch, LoadError>>)>,
}

impl MicroBatches {
    /// Returns the micro-batches of `loader` and `seed`; nothing is read yet.
    pub fn new(
        loader: Loader,
        flow: FlowStep,
        (depth, threads): (usize, usize),
        seed: u64,
        steps_before: u64,
        (spec, trained): (ModelSpec, Trained),
    ) -> Self {
        Self {
            loader: Arc::new(loader),
            flow,
            depth: depth.max(1),
            threads: threads.max(1),
            seed,
            steps_before,
            spec,
            trained,
            prefetch: None,
        }
    }

    /// Returns the sizes of a micro-batch's samples, its padding included.
    fn sizes(&self, batch: &Batch) -> Vec<SampleSize> {
        let side = |image: &Pixels| (image.height, image.width);
        let tokens = |image: &Pixels| self.loader.vision.num_tokens(image.height, image.width);
        let largest = batch.references.iter().flatten().map(tokens).max().unwrap_or(0);
        let most = batch.references.iter().map(Vec::len).max().unwrap_or(0);
        let longest = batch.ids.iter().map(Vec::len).max().unwrap_or(0);
        let prompt = self.spec.bridge.as_ref().map_or(longest, |bridge| match bridge.padding {
            Padding::Fixed(length) => length,
            Padding::Longest => longest.min(bridge.max_length + most * largest),
        });
        let sample = |(image, own): (&Pixels, &Vec<Pixels>)| SampleSize {
            prompt,
            image: side(image),
            references: own.iter().map(side).collect(),
        };
        batch.images.iter().zip(&batch.references).map(sample).collect()
    }

    /// Returns micro-batch `iteration`, prepared ahead by other threads; a jump, as after a resume, starts them anew.
    ///
    /// # Errors
    /// When sample after sample cannot be read.
    pub fn next(&mut self, iteration: u64) -> JobResult<Batch> {
        if self.prefetch.as_ref().is_none_or(|(next, _)| *next != iteration) {
            let (loader, shard) = (Arc::clone(&self.loader), Shard::single(self.seed));
            let job = move |number| loader.load(shard, number);
            let prefetch = Prefetch::new(iteration..u64::MAX, self.depth, self.threads, job);
            self.prefetch = Some((iteration, prefetch));
        }
        let (next, prefetch) = self.prefetch.as_mut().expect("it was started above");
        *next += 1;
        let batch = prefetch.next().ok_or_else(|| JobError::internal("the loader ended"))?;
        batch.or_input(|| format!("load batch {iteration}"))
    }

    /// Keeps micro-batch `iteration` as that of step `step` of the job, and returns the folder.
    ///
    /// # Errors
    /// When it cannot be read again or the disk is full.
    pub fn keep_as(&self, step: u64, iteration: u64, why: &str, context: &JobContext) -> JobResult<String> {
        let batch = self.loader.load(Shard::single(self.seed), iteration);
        suspects::keep(context, step, why, &batch.or_input(|| format!("read batch {iteration} again"))?)
    }
}

impl Losses<DeepGen> for MicroBatches {
    type Batch = Batch;

    fn batch(&mut self, iteration: u64, context: &mut JobContext) -> JobResult<Batch> {
        let batch = self.next(iteration)?;
        for replaced in &batch.replaced {
            context.emitter.warn(format!("a sample was replaced: {replaced}"));
        }
        if let Some(cache) = &self.flow.cache {
            cache.report(&mut context.emitter);
        }
        Ok(batch)
    }

    fn num_samples(batch: &Batch) -> usize {
        batch.images.len()
    }

    fn flops(&self, batch: &Batch) -> Option<f64> {
        self.sizes(batch).iter().map(|sample| training_step(&self.spec, self.trained, sample)).sum()
    }

    fn loss(&self, model: &DeepGen, iteration: u64, batch: &Batch, rows: Range<usize>) -> JobResult<Loss> {
        let stream = format!("train/{iteration}");
        let dropout_seed = self.seed ^ (iteration + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let of_batch = Rows { first: rows.start, count: rows.len(), total: batch.images.len() };
        let part = Part::of(batch, rows.clone());
        let value = with_dropout(dropout_seed, of_batch, || self.flow.loss(model, &part, &stream, &Sigmas::Drawn))?;
        Ok(Loss { name: loss_name("train", batch.task), value, keys: batch.keys[rows].to_vec() })
    }

    fn keep(&self, iteration: u64, why: &str, context: &JobContext) -> JobResult<String> {
        self.keep_as(self.steps_before + iteration, iteration, why, context)
    }
}
