//! A run: what can happen ([`event`]), where nodes stand ([`board`]), what is free ([`slots`]), what comes next ([`scheduler`], pure), and the
//! loop that connects these with the world ([`driver`]).

pub mod board;
pub mod driver;
pub mod event;
pub mod scheduler;
pub mod sealing;
pub mod slots;
